"""Small checkpoints to compile, and ways to do it."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from conftest import ROOT, sparse_weight
from safetensors.torch import save_file
from typer.testing import CliRunner

from sparse_backend import Options
from sparse_backend.cli import app
from sparse_backend.compiler.compile import compile_checkpoint

TERNARY = ROOT / "models" / "python-lm-ternary"
SHARD = 3000
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def save_model(folder, layers=4, config=CONFIG):
    """Two source shards; each layer gives an output shard of its own."""
    folder.mkdir(parents=True)
    tensors = {"model.embed_tokens.weight": sparse_weight(50, 32, 0.0), "model.norm.weight": torch.ones(32).bfloat16()}
    for i in range(layers):
        prefix = f"model.layers.{i}"
        tensors[f"{prefix}.self_attn.q_proj.weight"] = sparse_weight(32, 32, 0.5, seed=i)
        tensors[f"{prefix}.self_attn.q_proj.bias"] = torch.ones(32).bfloat16()
        tensors[f"{prefix}.mlp.down_proj.weight"] = sparse_weight(32, 64, 0.8, seed=10 + i)
        tensors[f"{prefix}.mlp.up_proj.weight"] = sparse_weight(64, 32, 0.0, seed=20 + i)
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[:5], names[5:]), 1):
        save_file({n: tensors[n] for n in part}, folder / f"model-{i}.safetensors", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, f"model-{i}.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def fingerprint(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def compiled(source, out, options=Options(), **kwargs):  # noqa: B008 - frozen
    """Compile, and take the result away again: its fingerprint and report."""
    report = compile_checkpoint(source, out, options, max_shard_bytes=SHARD, **kwargs)
    result = fingerprint(out)
    shutil.rmtree(out)
    return result, report


def interrupt(source, out, options=Options(), after=8):  # noqa: B008
    """A run that ends after so many tensors as Ctrl-C ends it."""

    def progress(done, total, what):
        nonlocal after
        after -= 1
        if after < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_checkpoint(source, out, options, progress, max_shard_bytes=SHARD)
    assert not out.exists()


def cli(*args):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def plain_model(folder, weight, config=CONFIG):
    """One source shard, its one projection `weight`."""
    folder.mkdir(parents=True)
    save_file({"model.layers.0.mlp.down_proj.weight": weight}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
