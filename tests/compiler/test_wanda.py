"""Wanda's calibration: norms against a Llama written out by hand, block by block, and what bad text gets."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import PYTHON_LM, ROOT
from safetensors.torch import load_file, save_file

from sparse_backend import CheckpointError, OptionError, Options
from sparse_backend.compiler import checkpoint, prune
from sparse_backend.compiler.compile import compile_checkpoint, plan_checkpoint
from sparse_backend.compiler.pruning import activations
from sparse_backend.compiler.pruning.pruner import Pruner
from sparse_backend.compiler.pruning.text import Calibration

TEXT = (ROOT / "CONTRIBUTING.md").read_text() * 4
HIDDEN, HEADS, KV_HEADS, HEAD = 48, 3, 1, 16
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These matrices are too small for threads to do anything but wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama in float32, saved by transformers, with the shipped model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=80, num_hidden_layers=3, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD, vocab_size=4096, max_position_embeddings=64, rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
    folder = tmp_path_factory.mktemp("models") / "llama"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((PYTHON_LM / name).read_bytes())
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.md"
    path.write_text(TEXT)
    return Calibration(path, tokens=2048)


def rms(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x):
    """Rotary position embedding of [tokens, heads, 16], theta 10000."""
    angles = torch.arange(len(x))[:, None] / 10000 ** (torch.arange(0, HEAD, 2) / HEAD)
    cos, sin = (f(torch.cat((angles, angles), -1))[:, None] for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def block_by_hand(x, w, prefix):
    """One Llama block on [tokens, hidden]: (output, the input of every linear layer)."""
    inputs = {}

    def linear(name, value):
        inputs[name] = value
        return value @ w[f"{prefix}.{name}.weight"].T

    normed = rms(x, w[f"{prefix}.input_layernorm.weight"])
    q, k, v = (linear(f"self_attn.{n}_proj", normed).view(len(x), -1, HEAD) for n in "qkv")
    q, k = rotate(q), rotate(k)
    scores = torch.einsum("qhd,khd->hqk", q, k.expand(-1, HEADS, -1)) / HEAD**0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf).softmax(-1)
    attended = torch.einsum("hqk,khd->qhd", scores, v.expand(-1, HEADS, -1)).reshape(len(x), -1)
    x = x + linear("self_attn.o_proj", attended)
    normed = rms(x, w[f"{prefix}.post_attention_layernorm.weight"])
    gated = torch.nn.functional.silu(linear("mlp.gate_proj", normed)) * linear("mlp.up_proj", normed)
    return x + linear("mlp.down_proj", gated), inputs


def norms_by_hand(weights, sequences, sparsity):
    """Norms of every linear layer's input, blocks pruned in sequence."""
    weights, norms = dict(weights), {}
    hidden = [weights["model.embed_tokens.weight"][ids] for ids in sequences]
    for i in range(3):
        prefix = f"model.layers.{i}"
        found = [block_by_hand(x, weights, prefix)[1] for x in hidden]
        for name in found[0]:
            module = f"{prefix}.{name}"
            norms[module] = torch.cat([inputs[name] for inputs in found]).double().norm(dim=0).float()
            if sparsity:
                weights[f"{module}.weight"] = prune.wanda(weights[f"{module}.weight"], norms[module], sparsity)
        hidden = [block_by_hand(x, weights, prefix)[0] for x in hidden]
    return norms


def silent(share, what):
    assert 0 <= share <= 1


@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_norms_are_those_of_a_llama_by_hand(llama, text, sparsity):
    sequences = text.sequences(llama, 64)
    assert sequences.shape == (32, 64)
    weights = load_file(llama / "model.safetensors")
    model = activations.load_model(llama, checkpoint.read_config(llama))

    def pruned(module, weight, norms):
        return prune.wanda(weight, norms, sparsity)

    found = activations.input_norms(model, sequences, pruned if sparsity else None, silent)
    assert found.dense_because is None
    expected = norms_by_hand(weights, sequences, sparsity)
    assert found.of.keys() == expected.keys()
    assert len(expected) == 3 * len(KINDS)
    for name, norms in expected.items():
        torch.testing.assert_close(found.of[name], norms, rtol=2e-4, atol=1e-5, msg=name)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), "the model is left as it was"


def test_pruning_earlier_blocks_changes_what_later_ones_see(llama, text):
    sequences = text.sequences(llama, 64)
    weights = load_file(llama / "model.safetensors")
    dense, sequential = (norms_by_hand(weights, sequences, sparsity) for sparsity in (0.0, 0.7))
    last = "model.layers.2.mlp.down_proj"
    assert not torch.allclose(dense[last], sequential[last], rtol=0.05), "or the test above shows nothing"


def test_compile_with_wanda_and_rules(llama, text, tmp_path):
    rules = ({"match": "*.o_proj", "method": "magnitude", "sparsity": 0.25}, {"match": "*.v_proj", "pattern": "2:4"})
    llama = changed(
        llama, tmp_path / "llama", {"dtype": "bfloat16"}, lambda weights: {n: w.bfloat16() for n, w in weights.items()}
    )
    options = Options(format="bitmask", sparsity=0.5, method="wanda", ignore=("*.layers.0.*k_proj",), rules=rules)
    said = []
    report = compile_checkpoint(llama, tmp_path / "out", options, verify=True, calibration=text, say=said.append)
    assert said == []
    assert report.changed["pruned"] == 3 * len(KINDS) - 1
    info = checkpoint.read(tmp_path / "out")
    assert info.config["quantization_config"]["method"] == "wanda"
    assert "text.md" not in json.dumps(info.config), "paths of this machine stay out of it"
    before = load_file(llama / "model.safetensors")
    after = dict(checkpoint.expand(load_file(tmp_path / "out" / "model.safetensors").items(), info.modules))
    name = "model.layers.0.self_attn.q_proj.weight"
    floats = {n: w.float() for n, w in before.items()}
    norms = norms_by_hand(floats, text.sequences(llama, 64), 0.0)[name.removesuffix(".weight")]
    assert (after[name] == prune.wanda(before[name], norms, 0.5)).float().mean() > 0.999
    assert not torch.equal(after[name], prune.magnitude(before[name], 0.5))
    assert torch.equal(
        after["model.layers.0.self_attn.k_proj.weight"], before["model.layers.0.self_attn.k_proj.weight"]
    )
    for i in range(3):
        o_proj, v_proj = f"model.layers.{i}.self_attn.o_proj.weight", f"model.layers.{i}.self_attn.v_proj.weight"
        assert torch.equal(after[o_proj], prune.magnitude(before[o_proj], 0.25))
        assert ((after[v_proj] == 0).view(HEAD, -1, 4).sum(2) == 2).all()
    planned = plan_checkpoint(llama, options, calibration=text)
    assert planned.by_format() == report.by_format()


def test_allocation_by_wandas_error(llama, text):
    options = Options(sparsity=0.5, method="wanda", allocation="error")
    pruner = Pruner(checkpoint.read(llama), options, text)
    pruner.prepare()
    weights = {name: w for name, w in load_file(llama / "model.safetensors").items() if "_proj" in name}
    zeros = sum(int((pruner.prune(n.removesuffix(".weight"), w, options) == 0).sum()) for n, w in weights.items())
    assert zeros / sum(w.numel() for w in weights.values()) == pytest.approx(0.5, abs=0.005)
    dense = norms_by_hand(load_file(llama / "model.safetensors"), text.sequences(llama, 64), 0.0)
    errors = []
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        scores = (weight * dense[module]).double().square()
        gone = prune.wanda(weight, dense[module], pruner.sparsity(module)) == 0
        errors.append(float(scores[gone].sum() / scores.sum()))
    assert max(errors) - min(errors) < 0.02


class Chatty(torch.nn.Module):
    """A model whose blocks also get something of their own from the text."""

    def __init__(self, per_block):
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
        self.embed = torch.nn.Embedding(4096, 8)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.per_block = per_block

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, self.embed(input_ids)) if self.per_block else block(x, None) * 2
        return x


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, hidden_states, extra):
        return self.linear(hidden_states) + (0 if extra is None else extra)


@pytest.mark.parametrize(
    ("per_block", "why"),
    [(True, "blocks.0 gets more from the text than hidden states"), (False, "the output of blocks.0 is not the input")],
)
def test_a_model_that_is_no_chain_of_blocks_is_measured_dense_and_says_so(per_block, why):
    model = Chatty(per_block).eval()
    ids = torch.randint(0, 4096, (4, 16))
    found = activations.input_norms(model, ids, lambda module, weight, norms: weight * 0, silent)
    assert why in found.dense_because
    seen = []
    model.blocks[1].linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        for row in ids:
            model(row[None])
    torch.testing.assert_close(found.of["blocks.1.linear"], torch.cat(seen).norm(dim=0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "has 0 tokens; at least 2048 are needed"),
        (b"def f(x):\n    return x\n" * 20, "tokens; at least 2048 are needed"),
        (bytes(range(256)) * 100, "is not text in UTF-8"),
        (b"a\0b" * 10000, "is not text in UTF-8"),
    ],
)
def test_bad_calibration_text(llama, tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError, match=message) as error:
        compile_checkpoint(
            llama, tmp_path / "out", Options(sparsity=0.5, method="wanda"), calibration=Calibration(path)
        )
    assert str(path) in str(error.value)
    assert not [p for p in tmp_path.iterdir() if p != path]


def test_calibration_of_no_use_or_too_little(llama, text, tmp_path):
    with pytest.raises(OptionError, match="is for methods wanda and sparsegpt"):
        compile_checkpoint(llama, tmp_path / "out", Options(sparsity=0.5), calibration=text)
    with pytest.raises(OptionError, match="on 100 tokens is too little"):
        Calibration(text.path, tokens=100)
    with pytest.raises(OptionError, match="cannot be read: Is a directory"):
        Calibration(tmp_path).read()


def changed(llama, folder, config=None, tensors=None, tokenizer=True):
    folder.mkdir()
    for path in llama.iterdir():
        if tokenizer or "tokenizer" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    if config is not None:
        (folder / "config.json").write_text(json.dumps({**checkpoint.read_config(llama), **config}))
    if tensors is not None:
        save_file(tensors(load_file(llama / "model.safetensors")), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"config": {"architectures": ["Unheard0fForCausalLM"]}},
            OptionError,
            "no architecture 'Unheard0fForCausalLM'",
        ),
        ({"config": {"architectures": None}}, OptionError, "no architecture None"),
        ({"tokenizer": False}, CheckpointError, "needs its tokenizer"),
        ({"tensors": lambda w: {**w, "vision.proj.weight": torch.ones(8, 8)}}, CheckpointError, "vision.proj"),
        (
            {"tensors": lambda w: {n: t for n, t in w.items() if n != "model.norm.weight"}},
            CheckpointError,
            "lacks model.norm.weight",
        ),
    ],
)
def test_models_that_cannot_be_calibrated(llama, text, tmp_path, change, error, message):
    model = changed(llama, tmp_path / "model", **change)
    with pytest.raises(error, match=message):
        compile_checkpoint(model, tmp_path / "out", Options(sparsity=0.5, method="wanda"), calibration=text)
    assert not (tmp_path / "out").exists()
