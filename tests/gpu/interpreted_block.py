"""Blocks of 16x16 on the GPU path; test_interpreted.py runs this file under TRITON_INTERPRET=1."""

from __future__ import annotations

import types

import pytest
import torch
from conftest import blocks_of_zeros
from gpu_tools import HALVES, check, exact, run

import sparse_backend as sb
from sparse_backend.formats import get_format
from sparse_backend.kernels.triton import block, common

SHAPES = [(1, 1), (16, 128), (70, 300), (3, 2050)]


def packed(n, k, zeros=0.5, values=None, group_size=None, dtype=torch.bfloat16):
    weight = blocks_of_zeros(n, k, zeros, dtype=dtype, seed=n + k)
    return get_format("block").pack(weight, sb.Options(format="block", values=values, group_size=group_size))


def test_the_interpreter_runs():
    assert common.interpreted()


@pytest.mark.parametrize("values", [None, "int8", "int4"])
@pytest.mark.parametrize("zeros", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_machine_form_holds_the_weight(n, k, zeros, values):
    p = packed(n, k, zeros, values)
    dense = block.naive_unpack(*p.lower("cuda").tensors.values(), k)
    expected = exact(p).unpack() if values else p.unpack().double()
    assert torch.allclose(dense[:n].double(), expected, rtol=1e-6, atol=0)
    assert not dense[n:].any()


def test_bytes_of_the_machine_form():
    p = packed(256, 2048)
    stored = p.tensors["values"].shape[0]
    assert p.lower("cuda").nbytes == stored * (512 + 4) + 4 * 17


@pytest.mark.parametrize("values", [None, "int8", "int4"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_kernel_on_every_shape(n, k, values):
    p = packed(n, k, 0.5, values)
    check(p, torch.randn(k))
    check(p, torch.randn(2, k).half(), torch.randn(n).half())
    check(p, torch.randn(1, k).bfloat16(), torch.randn(n).bfloat16())
    check(p, torch.randn(3, k), torch.randn(n))


@pytest.mark.parametrize("values", [None, "int8", "int4"])
def test_many_tokens(values):
    p = packed(40, 140, 0.5, values)
    for tokens in (17, 64, 65):
        check(p, torch.randn(tokens, 140), torch.randn(40))
    check(p, torch.randn(2, 9, 140).bfloat16())


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("tokens", [1, 2, 5, 65])
def test_scales_of_groups(size, tokens):
    check(packed(20, 300, 0.3, "int8", size), torch.randn(tokens, 300))
    check(packed(20, 300, 0.3, "int4", size), torch.randn(tokens, 300))


@pytest.mark.parametrize("zeros", [0.0, 1.0])
def test_all_blocks_and_none(zeros):
    p = packed(33, 100, zeros)
    for tokens in (1, 3, 65):
        check(p, torch.randn(tokens, 100), torch.randn(33))


@pytest.mark.parametrize("dtype", HALVES)
def test_values_and_activations_of_unlike_dtypes(dtype):
    p = packed(40, 64, dtype=dtype)
    for other in (*HALVES, torch.float32):
        check(p, torch.randn(1, 64).to(other))
        check(p, torch.randn(4, 64).to(other))


def test_strips_unlike_each_other_add_up_and_no_memory_is_read_before_it_is_written(monkeypatch):
    """Parts are cut by how much a strip stores on average; partial sums start as NaN here."""
    empty = torch.Tensor.new_empty

    def poisoned(tensor, *args, **kwargs):
        made = empty(tensor, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    weight = torch.zeros(64, 1000).bfloat16()
    weight[0:16] = torch.randn(16, 1000)  # 63 blocks, and 1, 0 and 4 below
    weight[20, 999], weight[50, 100:150] = 3, 2
    p = sb.pack(weight, format="block")
    assert p.tensors["values"].shape[0] == 63 + 1 + 4
    for tokens in (1, 2, 3):
        check(p, torch.randn(tokens, 1000))
    first, second = (run(p.lower("cuda"), torch.ones(1, 1000)) for _ in range(2))
    assert torch.equal(first, second)


def test_views_and_no_tokens():
    p = packed(20, 48)
    check(p, torch.randn(2, 50)[:, 1:49])
    check(p, torch.randn(48, 5).T)
    check(p, torch.randn(2, 96)[:, ::2])
    assert run(p.lower("cuda"), torch.randn(2, 0, 48)).shape == (2, 0, 20)


def test_what_has_no_kernel_is_refused():
    p = sb.pack(blocks_of_zeros(32, 64, 0.5), format="block", values="int4", activations="int8")
    with pytest.raises(sb.WeightError, match="no GPU kernel for int8 activations"):
        p.lower("cuda")


def test_more_weights_than_kernels_number_are_refused():
    for blocks, refused in ((2**23 - 1, False), (2**23, True)):
        values = torch.empty(blocks, 16, 8, dtype=torch.uint8, device="meta")
        p = types.SimpleNamespace(format="block", attributes={"values": "int4"}, tensors={"values": values})
        assert (block.refusal(p) is not None) == refused
    with pytest.raises(sb.WeightError, match=r"32 bits, this one stores 2\^31 or more"):
        block.lower(p, torch.device("cuda"))


def test_the_op_as_torch_compile_sees_it():
    tensors = packed(8, 64).lower("cuda").tensors.values()
    op = torch.ops.sparse_backend.block_triton_linear.default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (torch.randn(1, 64), *tensors, torch.randn(8), 8), test_utils=checks)
