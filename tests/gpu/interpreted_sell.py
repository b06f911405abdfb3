"""Arbitrary patterns on the GPU path; test_interpreted.py runs this file under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from conftest import sparse_weight
from gpu_tools import HALVES, check, exact, run

import sparse_backend as sb
from sparse_backend.kernels.triton import common, sell

SHAPES = [(1, 1), (5, 33), (70, 300), (3, 900)]


def packed(n, k, zeros, form="sell", values=None, dtype=torch.bfloat16, group_size=None):
    return sb.pack(sparse_weight(n, k, zeros, dtype, n + k), format=form, values=values, group_size=group_size)


def test_the_interpreter_runs():
    assert common.interpreted()


@pytest.mark.parametrize("values", [None, "int8", "int4"])
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_machine_form_holds_the_weight(n, k, zeros, values):
    p = packed(n, k, zeros, values=values)
    machine = p.lower("cuda")
    expected = exact(p).unpack() if values else p.unpack().double()
    assert torch.allclose(sell.naive_unpack(*machine.tensors.values(), (n, k)).double(), expected, rtol=1e-6, atol=0)
    x = torch.randn(1, k)
    check(p, x)
    check(p, torch.randn(2, k), torch.randn(n))


def test_bytes_of_the_machine_form():
    for zeros, values, bits, over in (
        (0.5, None, 24, 1.07), (0.7, None, 24, 1.1), (0.9, None, 24, 1.15),
        (0.5, "int8", 16, 1.09), (0.9, "int8", 16, 1.2), (0.5, "int4", 12, 1.15),
    ):  # fmt: skip
        p = packed(256, 2048, zeros, values=values)
        stored = p.tensors["values"].numel() * (2 if values == "int4" else 1)
        assert p.lower("cuda").nbytes <= over * stored * bits / 8


@pytest.mark.parametrize("values", [None, "int8", "int4"])
@pytest.mark.parametrize("form", ["sell", "bitmask"])
def test_products_of_every_bucket(form, values):
    p = packed(70, 200, 0.8, form, values)
    bias = torch.randn(70)
    for tokens in (1, 2, 3, 17, 65):
        check(p, torch.randn(tokens, 200), bias)
    check(p, torch.randn(2, 4, 200).bfloat16())
    check(p, torch.randn(1, 200).half(), bias.half())


@pytest.mark.parametrize("dtype", HALVES)
def test_values_and_activations_of_unlike_dtypes(dtype):
    p = packed(40, 64, 0.5, dtype=dtype)
    for other in (*HALVES, torch.float32):
        check(p, torch.randn(1, 64).to(other))
        check(p, torch.randn(4, 64).to(other))


def test_columns_far_apart_and_rows_unlike():
    weight = torch.zeros(9, 2000).bfloat16()
    weight[0, 1999], weight[1, 255], weight[1, 256], weight[2, [0, 255, 511, 1500]] = 1, 2, 3, 4
    weight[4, :300] = 5
    p = sb.pack(weight, format="sell")
    check(p, torch.randn(1, 2000))
    check(p, torch.randn(3, 2000))
    check(p, torch.randn(66, 2000))


def test_parts_of_k_add_up_and_no_memory_is_read_before_it_is_written(monkeypatch):
    empty = torch.Tensor.new_empty

    def poisoned(tensor, *args, **kwargs):
        made = empty(tensor, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    p = packed(10, 1000, 0.6)
    assert p.lower("cuda").tensors["starts"].shape[0] > 8
    for tokens in (1, 2, 3):
        check(p, torch.randn(tokens, 1000))
    first, second = (run(p.lower("cuda"), torch.ones(1, 1000)) for _ in range(2))
    assert torch.equal(first, second)


def test_views_and_no_tokens():
    p = packed(20, 48, 0.5)
    check(p, torch.randn(2, 50)[:, 1:49])
    check(p, torch.randn(48, 5).T)
    check(p, torch.randn(2, 96)[:, ::2])
    assert run(p.lower("cuda"), torch.randn(2, 0, 48)).shape == (2, 0, 20)


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 65])
def test_scales_of_groups(values, tokens):
    for size, zeros in ((64, 0.5), (128, 0.9), (128, 0.997)):
        p = packed(70, 300, zeros, "bitmask", values, group_size=size)
        assert p.lower("cuda").tensors["scales"].shape[0] == -(-300 // size)
        check(p, torch.randn(tokens, 300), torch.randn(70))


def test_what_has_no_kernel_is_refused():
    p = sb.pack(sparse_weight(8, 256, 0.5), format="bitmask", values="int8", activations="int8")
    with pytest.raises(sb.WeightError, match="no GPU kernel for int8 activations"):
        p.lower("cuda")


def test_the_op_as_torch_compile_sees_it():
    tensors = packed(8, 64, 0.5).lower("cuda").tensors.values()
    op = torch.ops.sparse_backend.sell_triton_linear.default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (torch.randn(1, 64), *tensors, torch.randn(8), 8), test_utils=checks)
