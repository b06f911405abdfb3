"""Models on the GPU kernels: whole ones through transformers, layers through what engines share.

test_interpreted.py runs this file under TRITON_INTERPRET=1.

transformers cannot be told `device_map="cuda"` where torch sees no GPU: what is patched is where adapters believe that
weights lie, and which card plans are made for. All else runs as it would, with tensors on the CPU.
"""

from __future__ import annotations

import types

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

import sparse_backend.engines.transformers as adapter
from sparse_backend import Options, SparseLinear, WeightError, pack
from sparse_backend.compiler import plan, prune
from sparse_backend.compiler.compile import compile_checkpoint
from sparse_backend.compiler.gpu_cost import GpuProfile
from sparse_backend.engines.common import Loading
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
    monkeypatch.setattr(Loading, "kernel_device", lambda self, tensor: torch.device("cuda"))
    monkeypatch.setattr(plan, "gpu_profile", lambda device: GpuProfile.of(H200))
    for module in (common, sell, block):  # one after the other here: no more programs than there are tiles
        monkeypatch.setattr(module, "PROGRAMS", 1)


def load(folder, monkeypatch=None, **kwargs):
    if monkeypatch is not None:  # on the CPU's kernels
        monkeypatch.setattr(Loading, "kernel_device", lambda self, tensor: tensor.device)
    return AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=LAYERS, **kwargs).eval()


def formats(model):
    found = [m for m in model.modules() if isinstance(m, SparseLinear)]
    return {(m.format, m.kernel_device) for m in found}, len(found)


def warned(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and r.name == adapter.logger.name]


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
    first = next(name for name in warned(caplog) if reason in name)
    assert "model.layers.0." in first or "lm_head" in first
    if "sparsity" not in options:
        assert torch.equal(model(IDS).logits, load(MODELS["python-lm"])(IDS).logits)


@pytest.mark.parametrize(("options", "reason"), [
    ({"format": "int8"}, "no cuda kernel for int8"), ({"format": "bf16x12"}, "no cuda kernel for bf16x12"),
    ({"sparsity": 0.5, "format": "bitmask", "values": "int8", "activations": "int8"}, "no GPU kernel for int8 activ"),
], ids=str)  # fmt: skip
def test_a_plain_model_is_dense_where_the_format_it_names_has_no_kernel(options, reason, caplog):
    with caplog.at_level("INFO"):
        model = load(MODELS["python-lm"], quantization_config=adapter.SparseCompiledConfig(**options))
    assert formats(model) == (set(), 0)
    (line,) = warned(caplog)
    assert line.startswith("dense, not as asked: model.layers.0.")
    assert line.count("model.layers.0.") == 3
    assert f" and {PROJECTIONS - 3} more: " in line
    assert reason in line
    assert "rounded as asked" not in caplog.text
    assert (f"{PROJECTIONS} projections pruned as asked" in caplog.text) == ("sparsity" in options)
    if "sparsity" not in options:
        assert torch.equal(model(IDS).logits, load(MODELS["python-lm"])(IDS).logits)


def engine_layer(weight):
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def test_layers_of_vllm_and_sglang_share_that():
    weight, parts = prune.magnitude(torch.randn(96, 128).bfloat16(), 0.9, "unstructured"), [("q", 64), ("k", 32)]
    loading = Loading()
    for name, options in (
        ("a", Options(format="bf16x12")), ("b", Options(format="int4")), ("c", Options(format="bf16x12")),
        ("d", Options(format="sell", values="int8", activations="int8")),
    ):  # fmt: skip
        layer = engine_layer(weight)
        loading.report.note("rounded")
        loading.report.note("rounded")
        assert loading.convert(layer, name, options, "", parts) is None
        assert torch.equal(layer.weight, weight)
    head = engine_layer(weight)
    assert loading.convert_head(head, "lm_head", "int8") is None
    assert torch.equal(head.weight, weight)
    assert "head" not in loading.report.changed
    layer = engine_layer(weight)
    kernel = loading.convert(layer, "e", Options(format="sell"), "", parts)
    x = torch.randn(1, 128)
    assert torch.allclose(kernel(layer, x, None), x @ weight.float().T, atol=1e-4)
    said, warnings = [], []
    loading.finish(Options(lm_head="int8"), said.append, warnings.append)
    assert warnings == [
        "dense, not as asked: a, c: no cuda kernel for bf16x12",
        "dense, not as asked: b: no cuda kernel for int4",
        "dense, not as asked: d: sell: no GPU kernel for int8 activations; pack with activations='keep'",
        "dense, not as asked: lm_head: no cuda kernel for int8",
    ]
    # Two for each of the four layers; d's two are not what became of it.
    assert any(line.startswith("6 projections rounded") for line in said)


def test_an_error_of_lowering_names_the_module():
    damaged = pack(torch.ones(8, 64).bfloat16(), "ternary")
    damaged.tensors["codes"][0, 0] = 255
    with pytest.raises(WeightError, match=r"^model\.q_proj: ternary: a code is none of 0, 1, 2"):
        Loading().install(engine_layer(torch.ones(8, 64)), "model.q_proj", damaged)


def test_what_kernels_refuse_goes_to_the_next_format(monkeypatch):
    weight = prune.magnitude(torch.randn(256, 1024).bfloat16(), 0.5, "4:16")
    options, card = Options(values="int8", group_size=64), torch.device("cuda")
    assert plan.choose(weight, options, GpuProfile.of(H200)).format == "nm"
    packed, _ = plan.pack(weight, options, card)
    assert packed.format in ("bitmask", "block")
    assert packed.lower("cuda").device == "cuda"
    packed, reason = plan.pack(weight, Options(values="int8", activations="int8"), card)
    assert packed is None
    assert "no GPU kernel for int8 activations" in reason
    assert "no lossless" not in reason
    packed, reason = plan.pack(weight + 1, Options(), card)  # nothing is refused: no format holds it in fewer bytes
    assert packed is None
    assert "no GPU kernel" not in reason
