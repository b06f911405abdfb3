"""The real transformers: compiled checkpoints, and plain ones converted as they are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from random_models import plain_copy
from reference import PROMPTS, Reference, tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import models
import sparse_backend.engines.transformers as adapter
from sparse_backend import CheckpointError, OptionError, Options, SparseLinear, WeightError
from sparse_backend.compiler.compile import compile_checkpoint

TERNARY = ROOT / "models" / "python-lm-ternary"

# As in test_vllm.py: two roundings of logits below 16, where bf16 steps by 2^-4.
TIE = 2 * 2.0**-4


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@torch.no_grad()
def logits(model, ids):
    return model(torch.tensor([ids])).logits[0].float()


def greedy(model, ids, count):
    """Tokens, and by how much each was ahead of the second, in log-probability."""
    arguments = {"max_new_tokens": count, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(torch.tensor([ids]), **arguments)
    best = torch.stack(out.logits, dim=1)[0].float().log_softmax(-1).topk(2).values
    return out.sequences[0, len(ids) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


def distance(a, b):
    return float((a - b).norm() / b.norm())


def sparse_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}


def held_bytes(model):
    return sum(t.nbytes for t in {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values())


def edited(folder, target, **options):
    """A copy with other load-time keys in its config.json."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"].update(options)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small for more: on a busy machine, threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prompts(python_lm):
    encode = tokenizer(python_lm).encode
    return [[0, *encode(text).ids] for text in PROMPTS]


@pytest.fixture(scope="module")
def dense(pruned_50):
    return Reference(pruned_50)


@pytest.fixture(scope="module")
def model_50(python_lm_50):
    return load(python_lm_50)


def test_generates_the_tokens_of_the_pruned_model(dense, model_50, prompts):
    for ids in prompts:
        (expected, gaps), (out, _) = greedy(dense.model, ids, 16), greedy(model_50, ids, 16)
        for step, (a, b) in enumerate(zip(expected, out, strict=False)):
            if a != b:
                assert gaps[step] <= TIE, f"token {step}: {a} became {b}, {gaps[step]:.3f} less likely"
                break
        assert distance(logits(model_50, ids), dense.logits(ids)) < 0.01


def test_batches_give_each_row_what_it_gets_alone(model_50, prompts):
    ids = [p[:4] for p in prompts]
    together = model_50.generate(torch.tensor(ids), max_new_tokens=8, do_sample=False)
    for row, alone in zip(together, ids, strict=True):
        assert torch.equal(model_50.generate(torch.tensor([alone]), max_new_tokens=8, do_sample=False)[0], row)


def test_no_dense_weight_is_left(model_50, dense, python_lm_50):
    layers = sparse_layers(model_50)
    assert len(layers) == 42
    assert {layer.format for layer in layers.values()} == {"bitmask"}
    # The tied head is the embedding.
    assert [n for n, m in model_50.named_modules() if isinstance(m, torch.nn.Linear)] == ["lm_head"]
    machine = sum(layer.machine_weight().nbytes for layer in layers.values())
    projections = sum(
        m.weight.nbytes for n, m in dense.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    )
    assert held_bytes(model_50) == held_bytes(dense.model) - projections + machine
    assert machine < 0.6 * projections
    # Nor the canonical form, whose tensors came as views of the file.
    assert str(python_lm_50) not in Path("/proc/self/maps").read_text()


def test_a_plain_checkpoint_is_converted_as_it_is_read(python_lm, pruned_50, model_50, dense, prompts):
    pruned = load(python_lm, quantization_config=adapter.SparseCompiledConfig(sparsity=0.5, format="bitmask"))
    found = load(pruned_50, quantization_config=adapter.SparseCompiledConfig(format="bitmask"))
    for model in (pruned, found):
        assert sparse_layers(model).keys() == sparse_layers(model_50).keys()
        assert held_bytes(model) == held_bytes(model_50)
        assert torch.equal(logits(model, prompts[0]), logits(model_50, prompts[0]))
    rules = [{"match": "re:.*layers\\.[0-3]\\..*", "format": "sell"}]
    config = adapter.SparseCompiledConfig(format="bitmask", ignore=["*.o_proj"], rules=rules, lm_head="int8")
    mixed = load(pruned_50, quantization_config=config)
    formats = [layer.format for layer in sparse_layers(mixed).values()]
    assert (formats.count("sell"), formats.count("bitmask"), formats.count("int8")) == (24, 12, 1)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(mixed.get_parameter(name), dense.model.get_parameter(name))
    assert distance(logits(mixed, prompts[0]), logits(model_50, prompts[0])) < 0.02


def test_ternary(tmp_path, prompts):
    compile_checkpoint(TERNARY, tmp_path / "ternary", Options())
    model = load(tmp_path / "ternary")
    assert {layer.format for layer in sparse_layers(model).values()} == {"ternary"}
    reference = Reference(TERNARY)
    keep = load(edited(tmp_path / "ternary", tmp_path / "keep", activations="keep"))
    for ids in prompts[:2]:
        expected = reference.logits(ids)
        assert distance(logits(model, ids), expected) < 0.015
        kept = logits(keep, ids)
        assert not torch.equal(kept, logits(model, ids))
        assert distance(kept, expected) < 0.1


@pytest.mark.parametrize(
    "options",
    [
        Options(sparsity=0.8, format="sell"),
        Options(sparsity=0.5, format="bitmask", values="int8"),
        Options(sparsity=0.5, format="bitmask", values="int4", group_size=64),
        Options(sparsity=0.8, format="sell", values="bf16x12"),
        Options(format="int8"),
        Options(format="ternary", bits=1.6, group_size=64),
    ],
    ids=lambda o: json.dumps(o.to_dict()),
)
def test_every_format_equals_its_dense_copy(python_lm, tmp_path, prompts, options):
    compile_checkpoint(python_lm, tmp_path / "out", options)
    plain_copy(tmp_path / "out", tmp_path / "plain")
    model = load(tmp_path / "out")
    assert {layer.format for layer in sparse_layers(model).values()} == {options.format}
    assert distance(logits(model, prompts[0]), Reference(tmp_path / "plain").logits(prompts[0])) < 0.01


def test_load_time_keys_of_config_json_are_obeyed(python_lm_50, tmp_path, model_50, prompts):
    ids = prompts[1]
    ignored = load(edited(python_lm_50, tmp_path / "ignored", ignore=["*.o_proj"]))
    assert len(sparse_layers(ignored)) == 36
    assert ignored.model.layers[2].self_attn.o_proj.weight.count_nonzero() == 256 * 128
    assert distance(logits(ignored, ids), logits(model_50, ids)) < 0.01
    other = load(edited(python_lm_50, tmp_path / "other", format="sell"))
    assert {layer.format for layer in sparse_layers(other).values()} == {"sell"}
    head = load(edited(python_lm_50, tmp_path / "head", lm_head="int8"))
    assert isinstance(head.lm_head, SparseLinear)
    assert head.get_input_embeddings().weight.dtype == torch.bfloat16
    assert distance(logits(head, ids), logits(model_50, ids)) < 0.02
    assert head.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False).shape[1] == len(ids) + 2


def test_float32_activations(python_lm_50, pruned_50, prompts):
    model = load(python_lm_50, dtype=torch.float32)
    assert distance(logits(model, prompts[0]), Reference(pruned_50, torch.float32).logits(prompts[0])) < 1e-5


def test_models_without_a_head_and_with_biases(tmp_path):
    compile_checkpoint(models.minilm(), tmp_path / "out", Options(sparsity=0.5, values="bf16", format="bitmask"))
    plain_copy(tmp_path / "out", tmp_path / "plain")
    ids = torch.tensor([[101, 2003, 2023, 102]])
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tmp_path / "plain")(ids).last_hidden_state
        model = AutoModel.from_pretrained(tmp_path / "out")
        assert len(sparse_layers(model)) == 36
        assert distance(model(ids).last_hidden_state, expected) < 1e-4


def test_layers_that_are_no_linear_stay_dense(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=128, n_positions=64, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    compile_checkpoint(tmp_path / "gpt2", tmp_path / "out", Options(sparsity=0.5, values="bf16", format="bitmask"))
    plain_copy(tmp_path / "out", tmp_path / "plain")
    with pytest.raises(OptionError, match="no projection to convert"):
        load(tmp_path / "plain", quantization_config=adapter.SparseCompiledConfig())
    model = load(tmp_path / "out")
    assert not sparse_layers(model)
    assert distance(logits(model, [3, 4, 5]), logits(load(tmp_path / "plain"), [3, 4, 5])) < 1e-5


def test_a_damaged_tensor_is_named(python_lm_50, tmp_path):
    folder = shutil.copytree(python_lm_50, tmp_path / "damaged")
    path = folder / "model.safetensors"
    name = "model.layers.3.mlp.up_proj"
    values = load_file(path)[f"{name}.bitmask.values"]
    data = bytearray(path.read_bytes())
    data[data.find(values.view(torch.uint8).numpy().tobytes()) + 11] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"model.safetensors: module {name} is damaged"):
        load(folder)
    path.write_bytes(data[:-9])
    with pytest.raises(CheckpointError, match=r"model.safetensors: truncated"):
        load(folder)


def test_what_is_wrong_with_a_plain_checkpoint_is_said(pruned_50, tmp_path):
    folder = shutil.copytree(pruned_50, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][5, 6] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError, match=r"model.layers.2.mlp.down_proj: .*NaN"):
        load(folder, quantization_config=adapter.SparseCompiledConfig(format="bitmask"))
    with pytest.raises(OptionError, match="'ignore' covers all"):
        load(pruned_50, quantization_config=adapter.SparseCompiledConfig(ignore=["*"]))
    with pytest.raises(OptionError, match="unknown option 'sparsty'; did you mean 'sparsity'"):
        adapter.SparseCompiledConfig(sparsty=0.5)


def test_what_cannot_be_done_is_said(python_lm_50, model_50, tmp_path):
    from transformers.distributed import DistributedConfig

    quantizer = adapter.SparseCompiledQuantizer(adapter.SparseCompiledConfig())
    for device_map in ("xpu:0", {"model": "cpu", "lm_head": "disk"}):
        with pytest.raises(OptionError, match="there are kernels for cpu and cuda"):
            quantizer.validate_environment(device_map=device_map)
    for device_map in ({"model": 0, "lm_head": "cpu"}, {"model": "cuda:1", "lm_head": torch.device("cpu")}):
        with pytest.raises(OptionError, match="over CPU and GPU"):
            quantizer.validate_environment(device_map=device_map)
    for device_map in (None, "cpu", "cuda", {"": 0}, {"model": "cuda:1", "lm_head": 0}):
        quantizer.validate_environment(device_map=device_map)
    assert sparse_layers(load(python_lm_50, device_map="cpu")).keys() == sparse_layers(model_50).keys()
    with pytest.raises(OptionError, match=r"device_map names 'meta'"):
        load(python_lm_50, device_map={"": "meta"})
    config = AutoModel.from_pretrained(python_lm_50).config
    config.distributed_config = DistributedConfig(tp_size=2)
    with pytest.raises(OptionError, match="tensor parallelism"):
        quantizer.update_tp_plan(config)
    with pytest.raises(CheckpointError, match=r"save_pretrained: .* copy .* instead"):
        model_50.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    adapter.register()  # again: nothing happens
