"""Whole models on the GPU kernels, through transformers; test_interpreted.py runs this file under TRITON_INTERPRET=1.

transformers cannot be told `device_map="cuda"` where torch sees no GPU: what is patched is where the adapter believes
that weights lie, and which card plans are made for. All else runs as it would, with tensors on the CPU.
"""

from __future__ import annotations

import types

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

import sparse_backend.engines.transformers as adapter
from sparse_backend import Options, SparseLinear
from sparse_backend.compiler import plan, prune
from sparse_backend.compiler.compile import compile_checkpoint
from sparse_backend.compiler.gpu_cost import GpuProfile
from sparse_backend.kernels.triton import block, common, sell

MODELS = {"python-lm": ROOT / "models" / "python-lm", "python-lm-ternary": ROOT / "models" / "python-lm-ternary"}
H200 = types.SimpleNamespace(
    name="NVIDIA H200", multi_processor_count=132, clock_rate=1980000, memory_clock_rate=3201000, memory_bus_width=6144,
    major=9,
)  # fmt: skip
LAYERS = 1  # the interpreter takes a second for a product
PROJECTIONS = 7 * LAYERS
IDS = torch.tensor([[0, 120, 300, 7]])


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    monkeypatch.setattr(adapter.SparseCompiledQuantizer, "kernel_device", lambda self, tensor: torch.device("cuda"))
    monkeypatch.setattr(plan, "gpu_profile", lambda device: GpuProfile.of(H200))
    for module in (common, sell, block):  # one after the other here: no more programs than there are tiles
        monkeypatch.setattr(module, "PROGRAMS", 1)


def load(folder, monkeypatch=None, **kwargs):
    if monkeypatch is not None:  # on the CPU's kernels
        monkeypatch.setattr(adapter.SparseCompiledQuantizer, "kernel_device", lambda self, tensor: tensor.device)
    return AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=LAYERS, **kwargs).eval()


def formats(model):
    found = [m for m in model.modules() if isinstance(m, SparseLinear)]
    return {(m.format, m.kernel_device) for m in found}, len(found)


@torch.no_grad()
def same_function(model, reference, *prompts, tokens=2):
    """Logits of prompts of some lengths, and what a prompt of two tokens goes on with."""
    for length in prompts:
        ids = torch.randint(0, 200, (1, length), generator=torch.Generator().manual_seed(length))
        a, b = model(ids).logits.float(), reference(ids).logits.float()
        assert (a - b).norm() < 0.015 * b.norm()
    arguments = {"max_new_tokens": tokens, "do_sample": False, "cache_implementation": "static"}
    expected = reference.generate(IDS[:, :2], **arguments)
    assert torch.equal(model.generate(IDS[:, :2], **arguments), expected)


@pytest.mark.parametrize(("options", "prompts"), [
    ({"pattern": "8:16", "format": "nm"}, ()), ({"sparsity": 0.8, "format": "sell"}, (3, 70)),
    ({"pattern": "4:16", "format": "nm", "values": "int4"}, ()),
], ids=str)  # fmt: skip
def test_a_compiled_model_generates_what_it_does_on_the_cpu(options, prompts, tmp_path, monkeypatch):
    compile_checkpoint(MODELS["python-lm"], tmp_path / "out", Options.from_dict(options))
    model = load(tmp_path / "out")
    assert formats(model) == ({(options["format"], "cuda")}, PROJECTIONS)
    same_function(model, load(tmp_path / "out", monkeypatch), *prompts)


def test_a_ternary_model(tmp_path, monkeypatch):
    compile_checkpoint(MODELS["python-lm-ternary"], tmp_path / "out", Options())
    model = load(tmp_path / "out")
    assert formats(model)[0] == {("ternary", "cuda")}
    same_function(model, load(tmp_path / "out", monkeypatch), 70)


def test_a_plain_model_is_planned_for_the_card(monkeypatch):
    pruned = load(MODELS["python-lm"], quantization_config=adapter.SparseCompiledConfig(sparsity=0.9))
    assert formats(pruned)[0] <= {("sell", "cuda"), ("bitmask", "cuda")}
    assert formats(pruned)[1] > 0
    patterned = load(MODELS["python-lm"], quantization_config=adapter.SparseCompiledConfig(pattern="8:16"))
    assert formats(patterned)[0] == {("nm", "cuda")}


@pytest.mark.parametrize(("options", "reason"), [
    ({"format": "bf16x12"}, "no cuda kernel for bf16x12"),
    ({"sparsity": 0.5, "format": "bitmask", "values": "int8", "activations": "int8"}, "no GPU kernel for int8 activ"),
    ({"format": "bf16x12", "lm_head": "int8"}, "no cuda kernel for int8"),
], ids=str)  # fmt: skip
def test_what_has_no_kernel_on_the_card_is_dense_and_said(options, reason, tmp_path, caplog):
    compile_checkpoint(MODELS["python-lm"], tmp_path / "out", Options.from_dict(options))
    with caplog.at_level("INFO"):
        model = load(tmp_path / "out")
    assert formats(model) == (set(), 0)
    assert reason in caplog.text
    if "sparsity" not in options:
        assert torch.equal(model(IDS).logits, load(MODELS["python-lm"])(IDS).logits)


def test_what_kernels_refuse_goes_to_the_next_format(monkeypatch):
    weight = prune.magnitude(torch.randn(256, 1024).bfloat16(), 0.5, "4:16")
    options, card = Options(values="int8", group_size=64), torch.device("cuda")
    assert plan.choose(weight, options, GpuProfile.of(H200)).format == "nm"
    packed, _ = plan.pack(weight, options, card)
    assert packed.format in ("bitmask", "block")
    assert packed.lower("cuda").device == "cuda"
    packed, reason = plan.pack(weight, Options(values="int8", activations="int8"), card)
    assert packed is None
    assert "dense" in reason or "no lossless" in reason
