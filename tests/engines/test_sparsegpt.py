"""SparseGPT by the real llm-compressor, in its own environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import PYTHON_LM, ROOT
from safetensors.torch import load_file

from sparse_backend import CheckpointError, OptionError, Options, envs
from sparse_backend.compiler import checkpoint, prune
from sparse_backend.compiler.compile import compile_checkpoint
from sparse_backend.compiler.pruning.text import Calibration

PYTHON = Path(os.environ.get(envs.PRUNE_PYTHON_VARIABLE, ROOT / ".venv" / "prune" / "bin" / "python"))


@pytest.fixture
def llm_compressor(monkeypatch):
    assert PYTHON.is_file(), f"{PYTHON} is not there: run `make env-prune`, or set {envs.PRUNE_PYTHON_VARIABLE}"
    monkeypatch.setenv(envs.PRUNE_PYTHON_VARIABLE, str(PYTHON))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=100, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, vocab_size=4096, max_position_embeddings=128, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "llama"
    model = LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():  # features of unequal size, which methods must notice
        model.model.embed_tokens.weight.mul_(torch.logspace(-1, 1, 64))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((PYTHON_LM / name).read_bytes())
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.md"
    path.write_text((ROOT / "CONTRIBUTING.md").read_text() * 4)
    return Calibration(path, tokens=4096)


def test_sparsegpt_prunes_and_makes_up_for_it(llama, text, tmp_path, llm_compressor):
    rules = (
        {"match": "*.v_proj", "pattern": "2:4"},
        {"match": "*.o_proj", "sparsity": 0.75},
        {"match": "*.up_proj", "method": "magnitude"},
    )
    options = Options(
        format="bitmask", sparsity=0.5, method="sparsegpt", ignore=("*.layers.1.mlp.down_proj",), rules=rules
    )
    out = tmp_path / "out"
    report = compile_checkpoint(llama, out, options, verify=True, calibration=text)
    assert report.changed["pruned"] == 13
    info = checkpoint.read(out)
    after = dict(checkpoint.expand(load_file(out / "model.safetensors").items(), info.modules))
    before = load_file(llama / "model.safetensors")
    for name, weight in after.items():
        if "_proj" not in name:
            assert torch.equal(weight, before[name]), f"{name} is not for pruning"
            continue
        zeros = float((weight == 0).float().mean())
        if "layers.1.mlp.down_proj" in name:
            assert torch.equal(weight, before[name])
        elif "up_proj" in name:
            assert torch.equal(weight, prune.magnitude(before[name], 0.5))
        else:
            assert zeros == pytest.approx(0.75 if "o_proj" in name else 0.5, abs=0.01)
            assert not torch.equal(weight, before[name].masked_fill(weight == 0, 0)), "what stays was updated"
        if "v_proj" in name:
            assert ((weight == 0).view(-1, 4).sum(1) == 2).all()
    # The first projections see the embedding, normalised: what they lose on it can be computed here.
    x = before["model.embed_tokens.weight"][text.sequences(llama, 128).flatten()].float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = before[name].float()
    loss = {
        method: float((x @ (pruned.float() - weight).T).norm())
        for method, pruned in {
            "sparsegpt": after[name],
            "wanda": prune.wanda(weight, x.norm(dim=0), 0.5),
            "magnitude": prune.magnitude(weight, 0.5),
        }.items()
    }
    assert loss["sparsegpt"] < loss["wanda"] < loss["magnitude"]
    assert not [p.name for p in tmp_path.iterdir() if p.name not in ("out", "text.md")]


def test_without_llm_compressor(llama, text, tmp_path, monkeypatch):
    options = Options(sparsity=0.5, method="sparsegpt")
    monkeypatch.delenv(envs.PRUNE_PYTHON_VARIABLE, raising=False)
    with pytest.raises(OptionError, match=r"make env-prune.*set SPARSE_BACKEND_PRUNE_PYTHON"):
        compile_checkpoint(llama, tmp_path / "out", options, calibration=text)
    monkeypatch.setenv(envs.PRUNE_PYTHON_VARIABLE, str(tmp_path / "python"))
    with pytest.raises(OptionError, match="no such file; give the path of a Python"):
        compile_checkpoint(llama, tmp_path / "out", options, calibration=text)
    uneven = Options(method="sparsegpt", pattern="8:16")
    monkeypatch.setenv(envs.PRUNE_PYTHON_VARIABLE, str(PYTHON))
    with pytest.raises(OptionError, match=r"down_proj: .* needs a multiple of 16 columns, it has 100"):
        compile_checkpoint(llama, tmp_path / "out", uneven, calibration=text)


def test_what_llm_compressor_says_is_passed_on(llama, text, tmp_path, monkeypatch):
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho 'ModuleNotFoundError: No module named llmcompressor' >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setenv(envs.PRUNE_PYTHON_VARIABLE, str(failing))
    with pytest.raises(CheckpointError, match=r"failed with exit code 3:\nModuleNotFoundError"):
        compile_checkpoint(llama, tmp_path / "out", Options(sparsity=0.5, method="sparsegpt"), calibration=text)
    assert not (tmp_path / "out").exists()
