"""Rows of the capability table for GPUs; test_interpreted.py runs this file under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from conftest import sparse_weight
from gpu_tools import run

import sparse_backend as sb
from sparse_backend.compiler import prune
from sparse_backend.formats import naive_linear
from sparse_backend.kernels import registry


def example(form):
    weight = sparse_weight(20, 64, 0.5)
    return sb.pack(prune.magnitude(weight, 0.5, "8:16") if form == "nm" else weight, format=form)


@pytest.mark.parametrize("row", registry.rows("cuda"), ids=lambda row: row.format)
def test_the_table_matches_what_the_modules_register(row):
    chosen, reason = registry.select(row.format, "cuda", row.values[0])
    assert chosen is row
    assert row.op in reason
    names = [a.name for a in row.function()._schema.arguments]
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
