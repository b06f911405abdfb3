"""The kernels against the naive reference, at every level the machine has."""

from __future__ import annotations

import pytest
import torch
from conftest import sparse_weight
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_backend as sb
from sparse_backend.formats import naive_linear
from sparse_backend.kernels import cpu

# Relative error of one rounding to the output dtype, plus fp32 accumulation over K.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 1e-5}
DTYPES = list(TOLERANCE)


def check(x, packed, bias=None):
    y = sb.linear(x, packed, bias)
    expected = naive_linear(x, packed, bias)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], packed.shape[0])
    # Errors scale with the sum of magnitudes, not with a result that cancels to nothing.
    scale = x.double().abs() @ packed.unpack().double().abs().T + (0 if bias is None else bias.double().abs())
    error = (y.double() - expected).abs()
    allowed = TOLERANCE[x.dtype] * (expected.abs() + 1e-30) + 1e-6 * scale
    assert (error <= allowed).all(), f"off by {(error / allowed).max():.2f} times the tolerance"
    return y


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 700),
    tokens=st.integers(1, 12),
    zeros=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    values=st.sampled_from(DTYPES[:2]),
    x_dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_any_pattern(n, k, tokens, zeros, values, x_dtype, bias, seed):
    packed = sb.pack(sparse_weight(n, k, zeros, values, seed))
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)).to(x_dtype)
    for level in cpu.available_levels():
        with cpu.forced_isa(level):
            check(x, packed, torch.randn(n).to(x_dtype) if bias else None)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8, 9, 16, 33, 96, 97, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(isa, tokens, dtype):
    packed = sb.pack(sparse_weight(61, 1100, 0.6))
    x = torch.randn(tokens, 1100).to(dtype)
    together = check(x, packed)
    alone = torch.cat([sb.linear(row[None], packed) for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_the_same_on_any_number_of_threads_and_every_time(isa, tokens):
    packed = sb.pack(sparse_weight(333, 2000, 0.5))
    x = torch.randn(tokens, 2000).bfloat16()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2, 1):
            torch.set_num_threads(threads)
            results.append(sb.linear(x, packed))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_strides_dimensions_and_empty_batches(isa):
    packed = sb.pack(sparse_weight(19, 45, 0.5))
    base = torch.randn(7, 5, 90).bfloat16()
    for x in (base[..., ::2], base[..., :45].transpose(0, 1), base[0, 0, 45:], base[..., 1:46], base[:, 0, 3:48]):
        check(x, packed)
    for shape in ((0, 45), (3, 0, 45)):
        assert sb.linear(torch.empty(shape), packed).shape == (*shape[:-1], 19)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_weights(isa, shape):
    packed = sb.pack(torch.zeros(shape, dtype=torch.bfloat16))
    y = sb.linear(torch.ones(3, shape[1]), packed, torch.ones(shape[0]))
    assert torch.equal(y, torch.ones(3, shape[0]))


def test_bias_of_another_dtype_and_stride(isa):
    packed = sb.pack(sparse_weight(20, 64, 0.5))
    check(torch.randn(3, 64).bfloat16(), packed, torch.randn(40)[::2])


def test_nan_and_inf_activations_pass_through_like_dense(isa):
    packed = sb.pack(sparse_weight(8, 64, 0.5))
    x = torch.ones(3, 64).bfloat16()
    x[1, 5] = float("nan")
    y = sb.linear(x, packed)
    assert torch.isnan(y[1]).all()
    assert torch.isfinite(y[[0, 2]]).all()


def test_extreme_magnitudes_accumulate_in_float32(isa):
    # 4096 x 2^-9: each addend is lost next to 1.0 in bf16, none in fp32.
    weight = torch.full((4, 4096), 2.0**-9).bfloat16()
    y = sb.linear(torch.ones(1, 4096).bfloat16(), sb.pack(weight))
    assert torch.equal(y, torch.full((1, 4), 8.0).bfloat16())


def test_long_rows(isa):
    packed = sb.pack(sparse_weight(6, 70000, 0.7))
    for tokens in (1, 20):
        check(torch.randn(tokens, 70000).bfloat16(), packed)


def test_wrong_arguments_are_named():
    packed = sb.pack(sparse_weight(8, 64, 0.5))
    machine = packed.lower().tensors["packed"]
    ops = torch.ops.sparse_backend
    with pytest.raises(RuntimeError, match="in_features = 64"):
        sb.linear(torch.ones(2, 63), packed)
    with pytest.raises(RuntimeError, match=r"bias must have shape \[8\]"):
        sb.linear(torch.ones(2, 64), packed, torch.ones(9))
    with pytest.raises(RuntimeError, match="bfloat16, float16 or float32"):
        sb.linear(torch.ones(2, 64, dtype=torch.int32), packed)
    wild = machine.clone()
    wild[72:80] = 0x7F
    for broken in (wild, machine[:20], machine[:-1], torch.zeros_like(machine), machine[64:]):
        with pytest.raises(RuntimeError, match="packed weight"):
            ops.bitmask_linear(torch.ones(2, 64), broken.contiguous(), None, 8)
