"""N:M on the GPU path; test_interpreted.py runs this file under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from conftest import sparse_weight
from gpu_tools import HALVES, check, exact, run

import sparse_backend as sb
from sparse_backend.compiler import prune
from sparse_backend.kernels.triton import common, nm
from sparse_backend.options import NM_PATTERNS

SHAPES = [(1, 1), (70, 300), (3, 700)]


def pruned(n, k, pattern, seed=0, dtype=torch.bfloat16):
    return prune.magnitude(sparse_weight(n, k, 0.1, dtype, seed), 0.5, pattern)


def packed(n, k, pattern, values=None, group_size=None, dtype=torch.bfloat16):
    options = sb.Options(format="nm", pattern=pattern, values=values, group_size=group_size)
    from sparse_backend.formats import get_format

    return get_format("nm").pack(pruned(n, k, pattern, n + k, dtype), options)


def test_the_interpreter_runs():
    assert common.interpreted()


@pytest.mark.parametrize("pattern", list(NM_PATTERNS))
@pytest.mark.parametrize("values", [None, "int8", "int4"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_machine_form_holds_the_weight(n, k, pattern, values):
    p = packed(n, k, pattern, values)
    dense = nm.naive_unpack(*p.lower("cuda").tensors.values(), k)
    expected = exact(p).unpack() if values else p.unpack().double()
    assert torch.allclose(dense[:n].double(), expected, rtol=1e-6, atol=0)
    assert not dense[n:].any()


def test_bytes_of_the_machine_form():
    for pattern, (few, of) in NM_PATTERNS.items():
        for values, bits in ((None, 20), ("int8", 12), ("int4", 8)):
            stored = 256 * 2048 * few // of
            scales = {None: 0, "int8": 4 * 256, "int4": 4 * 256 * 2048 // 128}[values]
            assert packed(256, 2048, pattern, values).lower("cuda").nbytes == stored * bits // 8 + scales


@pytest.mark.parametrize("pattern", ["8:16", "6:16", "4:16"])
@pytest.mark.parametrize("values", [None, "int8", "int4"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_one_and_two_tokens(n, k, pattern, values):
    p = packed(n, k, pattern, values)
    check(p, torch.randn(k), torch.randn(n).bfloat16())
    check(p, torch.randn(2, k).bfloat16())


@pytest.mark.parametrize("values", [None, "int8", "int4"])
@pytest.mark.parametrize("pattern", ["8:16", "6:16", "4:16"])
def test_batches_on_tensor_cores_and_prefill(pattern, values):
    n = 70 if pattern == "8:16" else 30
    p = packed(n, 140, pattern, values)
    bias = torch.randn(n)
    check(p, torch.randn(65, 140), bias)
    if pattern == "8:16":
        check(p, torch.randn(3, 140), bias)
        check(p, torch.randn(33, 140).half(), bias.half())
    check(p, torch.randn(2, 9, 140).bfloat16())


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("tokens", [1, 2, 3, 65])
def test_scales_of_groups(size, tokens):
    check(packed(20, 300, "8:16", "int8", size), torch.randn(tokens, 300))
    check(packed(20, 300, "8:16", "int4", size), torch.randn(tokens, 300))


def test_scales_finer_than_a_supergroup_are_refused():
    with pytest.raises(sb.WeightError, match="no GPU kernel for scales of 64 columns at 4:16; use a group_size of 128"):
        packed(64, 256, "4:16", "int8", 64).lower("cuda")
    check(packed(20, 200, "4:16", "int8", 128), torch.randn(3, 200))
    check(packed(20, 300, "6:16", "int8", 128), torch.randn(1, 300))


@pytest.mark.parametrize("dtype", HALVES)
def test_values_and_activations_of_unlike_dtypes(dtype):
    p = packed(40, 64, "8:16", dtype=dtype)
    for other in (*HALVES, torch.float32):
        check(p, torch.randn(1, 64).to(other))
        check(p, torch.randn(4, 64).to(other))


def test_splits_of_k_add_up_and_no_memory_is_read_before_it_is_written(monkeypatch):
    """Few tiles: K is cut into as many parts as it has steps. Partial sums start as NaN here."""
    empty = torch.Tensor.new_empty

    def poisoned(tensor, *args, **kwargs):
        made = empty(tensor, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    p = packed(10, 1000, "8:16")
    assert common.splits_for(1, 64 // 8) == 8
    for tokens in (1, 2, 3):
        check(p, torch.randn(tokens, 1000))
    first, second = (run(p.lower("cuda"), torch.ones(1, 1000)) for _ in range(2))
    assert torch.equal(first, second)


def test_views_that_no_vector_load_could_read():
    p = packed(20, 48, "8:16")
    rows = torch.randn(2, 50)
    check(p, rows[:, 1:49])  # x starts off any alignment
    check(p, torch.randn(48, 5).T)
    check(p, torch.randn(2, 96)[:, ::2])


def test_no_tokens():
    p = packed(8, 32, "8:16")
    assert run(p.lower("cuda"), torch.randn(0, 32)).shape == (0, 8)
    assert run(p.lower("cuda"), torch.randn(2, 0, 32)).shape == (2, 0, 8)


def test_the_op_as_torch_compile_sees_it():
    p = packed(8, 64, "8:16")
    tensors = p.lower("cuda").tensors.values()
    op = torch.ops.sparse_backend.nm_triton_linear.default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (torch.randn(1, 64), *tensors, torch.randn(8), 8), test_utils=checks)
