"""Rows of the capability table for GPUs; test_interpreted.py runs this file under TRITON_INTERPRET=1."""

from __future__ import annotations

import weakref

import pytest
import torch
from conftest import sparse_weight
from gpu_tools import run

import sparse_backend as sb
from sparse_backend.compiler import prune
from sparse_backend.formats import naive_linear
from sparse_backend.kernels import registry
from sparse_backend.kernels.triton import common, tuning


def example(form):
    weight = sparse_weight(20, 64, 0.5)
    return sb.pack(prune.magnitude(weight, 0.5, "8:16") if form == "nm" else weight, format=form)


@pytest.mark.parametrize("row", registry.rows("cuda"), ids=lambda row: row.format)
def test_the_table_matches_what_the_modules_register(row):
    chosen, reason = registry.select(row.format, "cuda", row.values[0])
    assert chosen is row
    assert row.op in reason
    names = [a.name for a in row.function()._schema.arguments if a.name != "absmax"]
    machine = example(row.format).lower("cuda")
    assert names == ["x", *machine.tensors, "bias", "out_features"]
    assert machine.device == "cuda"


@pytest.mark.parametrize("row", registry.rows("cuda"), ids=lambda row: row.format)
def test_a_layer_runs_the_kernels_its_weight_was_lowered_for(row):
    packed, x = example(row.format), torch.randn(1, 64)
    layer = sb.SparseLinear(packed.lower("cuda"), torch.randn(20))
    assert torch.equal(layer(x), run(packed.lower("cuda"), x, layer.bias))
    again = sb.SparseLinear(packed.lower("cuda"), torch.zeros(20))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    assert torch.equal(sb.linear(x, layer.machine_weight(), layer.bias), layer(x))
    assert torch.allclose(layer(x).double(), naive_linear(x, packed, layer.bias), atol=1e-4)


def test_scratch_that_was_given_out_is_kept_when_a_larger_one_is_needed(monkeypatch):
    """A CUDA graph that was captured with it still writes there."""
    monkeypatch.setattr(common, "_scratch", {})
    monkeypatch.setattr(common, "_given_out", {})
    x = torch.empty(0, dtype=torch.bfloat16)
    common.reserve(x.device, 16)
    unused = weakref.ref(common._scratch[x.device])
    common.reserve(x.device, 32)
    assert unused() is None
    address = common.scratch(x, (4, 8)).fill_(1).data_ptr()
    used = weakref.ref(common._scratch[x.device])
    common.reserve(x.device, 64)
    assert common.scratch(x, (8, 8)).data_ptr() != address
    assert used() is not None
    assert used().data_ptr() == address
    assert (used().view(x.dtype) == 1).all()


def test_machine_forms_of_two_devices_live_side_by_side():
    packed, x = example("nm"), torch.randn(3, 64).bfloat16()
    assert packed.lower("cuda") is packed.lower("cuda")
    assert packed.lower().device == "cpu"
    on_cpu = sb.linear(x, packed)
    assert torch.allclose(on_cpu.float(), run(packed.lower("cuda"), x).float(), rtol=2e-2, atol=2e-2)


def test_what_is_not_there_is_an_error():
    with pytest.raises(sb.OptionError, match="there are: bitmask on cpu"):
        registry.select("bitmask", "xpu", torch.bfloat16)
    with pytest.raises(sb.OptionError, match="no nm kernel for values of"):
        registry.select("nm", "cuda", torch.float32)
    with pytest.raises(sb.IsaError, match="is one of CPUs"):
        example("nm").lower("cuda", isa="avx2")


@pytest.mark.parametrize("row", registry.rows("cuda"), ids=lambda row: row.format)
def test_torch_compile_takes_a_layer_whole(row):
    layer = sb.SparseLinear(example(row.format).lower("cuda"), torch.randn(20))
    for backend in ("eager", "aot_eager"):  # no code is generated: what is tested is that nothing breaks the graph
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        for tokens in (1, 2, 5):
            x = torch.randn(tokens, 64)
            assert torch.equal(compiled(x), layer(x))
    torch._dynamo.reset()


def test_tuned_settings_are_kept_per_card_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.file_of("NVIDIA H200") is None
    file = tuning.user_file("NVIDIA H200")
    assert file.name == "gpu-nvidia-h200.json"
    settings = {family: dict(tuning.defaults(family)) for family in tuning.FAMILIES}
    other = next(launch for launch in tuning.grid("nm", ("gemv", 1)) if launch != settings["nm"]["gemv", 1])
    settings["nm"]["gemv", 1] = other
    tuning.save(file, "NVIDIA H200", settings)
    assert tuning.file_of("NVIDIA H200") == file
    assert tuning.load(file) == settings
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert tuning.launches(torch.device("cuda:7"), "nm")["gemv", 1] == other
    assert tuning.launches(torch.device("cuda:7"), "sell") == tuning.defaults("sell")
    tuning._launches.cache_clear()
    # Every setting there is to try gives the same product.
    packed, x = example("nm"), torch.randn(1, 64)
    for launch in tuning.grid("nm", ("gemv", 1)):
        with tuning.trying("nm", ("gemv", 1), launch):
            assert torch.allclose(run(packed.lower("cuda"), x).double(), naive_linear(x, packed), atol=1e-4)


@pytest.mark.parametrize("text", [
    "", "{}", '{"version": 0, "kernels": {}}', '{"version": 1, "kernels": {"nm/gemv/1": [3, 3, 3]}}',
    '{"version": 1, "kernels": {"nm/gemm/1": [2, 4, 4]}}', '{"version": 1, "kernels": {"gemv": 1}}',
])  # fmt: skip
def test_a_file_of_settings_that_are_none_is_named(tmp_path, text):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(sb.OptionError, match=r"card\.json: holds no launch settings .*remove it"):
        tuning.load(tmp_path / "card.json")
