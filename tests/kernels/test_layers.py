"""Attention, dense products, norms, rotary embedding and SwiGLU against their naive references."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sparse_backend.kernels import cpu, layers

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rounding of the result, and float32 sums in another order than the reference's.
TOLERANCE = {torch.bfloat16: 0.01, torch.float16: 2e-3, torch.float32: 2e-5}


def close(got, expected):
    tolerance = TOLERANCE[got.dtype]
    scale = expected.float().abs().mean().clamp_min(1e-6)
    torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=float(tolerance * scale))


def paged(lengths, new, heads=6, kv_heads=2, dim=64, v_dim=None, dtype=torch.bfloat16, seed=0):
    """Sequences in a cache whose slots are in no order; slots that nobody owns are NaN."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    order = torch.randperm(total + 7, generator=generator).int()
    table = torch.full((len(lengths) + 2, max(lengths, default=0) + 3), 2**30, dtype=torch.int32)
    rows = torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)]
    k = torch.full((total + 7, kv_heads, dim), float("nan"), dtype=dtype)
    v = torch.full((total + 7, kv_heads, v_dim or dim), float("nan"), dtype=dtype)
    first = 0
    for row, length in zip(rows.tolist(), lengths, strict=True):
        slots = order[first : first + length]
        table[row, :length] = slots
        k[slots.long()] = torch.randn(length, kv_heads, dim, generator=generator).to(dtype)
        v[slots.long()] = torch.randn(length, kv_heads, v_dim or dim, generator=generator).to(dtype)
        first += length
    q = torch.randn(sum(new), heads, dim, generator=generator).to(dtype)
    return [q, k, v, table, rows, torch.tensor(lengths, dtype=torch.int64), torch.tensor(new, dtype=torch.int64)]


def attend(case, scale=0.125, window=-1, cap=0.0, causal=True):
    got = cpu.ops().paged_attention(*case, scale, window, cap, causal)
    close(got, layers.naive_paged_attention(*case, scale, window, cap, causal))
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (20, 1), (3, 1)])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (80, 80), (24, 40), (7, 5)])
def test_attention(isa, dtype, heads, dims):
    attend(paged([1, 70, 33, 5], [1, 1, 20, 5], *heads, *dims, dtype))


@pytest.mark.parametrize("lengths", [[1], [63], [64], [65], [1023], [1025], [2500, 3], [2049, 1024, 1, 65]])
def test_decoding_at_the_edges_of_blocks_and_segments(isa, lengths):
    case = paged(lengths, [1] * len(lengths))
    got = attend(case)
    assert torch.equal(got, cpu.ops().paged_attention(*case[:6], None, 0.125, -1, 0.0, True))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_attention_of_any_sequences(data):
    lengths = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=4))
    new = [data.draw(st.integers(1, length)) for length in lengths]
    window = data.draw(st.sampled_from([-1, 0, 3, 64, 100]))
    cap = data.draw(st.sampled_from([0.0, 5.0, 50.0]))
    attend(paged(lengths, new, seed=len(lengths)), window=window, cap=cap, causal=data.draw(st.booleans()))


def test_attention_does_not_depend_on_batch_chunks_or_threads(isa):
    lengths = [2300, 40, 700]
    case = paged(lengths, lengths)
    whole = attend(case)
    q, k, v, table, rows, _, _ = case
    first = 0
    for i, length in enumerate(lengths):
        for begin in range(0, length, 333):
            end = min(begin + 333, length)
            part = cpu.ops().paged_attention(
                q[first + begin : first + end], k, v, table, rows[i : i + 1], torch.tensor([end]),
                torch.tensor([end - begin]), 0.125, -1, 0.0, True,
            )  # fmt: skip
            assert torch.equal(part, whole[first + begin : first + end])
        last = first + length - 1
        alone = (q[last : last + 1], k, v, table, rows[i : i + 1], torch.tensor([length]), None, 0.125, -1, 0.0, True)
        assert torch.equal(cpu.ops().paged_attention(*alone)[0], whole[last])
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        assert torch.equal(cpu.ops().paged_attention(*alone)[0], whole[last])
        torch.set_num_threads(before)
        first += length


def test_attention_of_large_scores_and_of_nan(isa):
    case = paged([90, 20], [2, 2], dtype=torch.float32)
    case[0] *= 1e4
    attend(case)
    case[0][3, 2, 5] = float("nan")
    got = cpu.ops().paged_attention(*case, 0.125, -1, 0.0, True)
    assert got[3, 2].isnan().all()
    assert not got[:3].isnan().any()
    assert not got[3, [0, 1, 3, 4, 5]].isnan().any()


def test_attention_of_nothing_and_of_strided_queries(isa):
    empty = paged([], [])
    assert cpu.ops().paged_attention(*empty, 1.0, -1, 0.0, True).shape == (0, 6, 64)
    case = paged([9, 4], [3, 1])
    wide = torch.randn(4, 9, 64).bfloat16()
    case[0] = wide[:, 1:7]
    assert not case[0].is_contiguous()
    attend(case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: lambda t: t.clone().fill_(-1)}, "a slot that the caches do not have"),
        ({4: lambda t: t + 4}, "outside slot_table"),
        ({5: lambda t: t + 100}, "longer than slot_table"),
        ({6: lambda t: t + 100}, "more new tokens than positions"),
        ({6: lambda t: t * 0}, "as many tokens"),
        ({3: lambda t: t.long()}, "int32"),
        ({5: lambda t: t.int()}, "lengths must be a contiguous int64"),
        ({1: lambda t: t.float()}, "both caches must have the same dtype"),
        ({0: lambda t: t[:, :5]}, "5 query heads for 2"),
        ({0: lambda t: t[:, :, :32].contiguous()}, "head_dim is 32 of q and 64"),
        ({0: lambda t: t.transpose(0, 1)}, "contiguous tokens"),
        ({1: lambda t: t[:-1]}, "caches must be contiguous"),
    ],
)
def test_attention_refuses_what_does_not_fit(change, message):
    case = paged([9, 4], [3, 1])
    for index, function in change.items():
        case[index] = function(case[index])
    with pytest.raises(RuntimeError, match=message):
        cpu.ops().paged_attention(*case, 1.0, -1, 0.0, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (4, 16), (33, 70), (130, 2500), (5, 4096)])
@pytest.mark.parametrize("tokens", [1, 3, 8, 70])
def test_dense_linear(isa, dtype, shape, tokens):
    n, k = shape
    weight, x, bias = torch.randn(n, k).to(dtype), torch.randn(tokens, k).to(dtype), torch.randn(n)
    got = cpu.ops().dense_linear(x, weight, bias)
    expected = x.double() @ weight.double().T + bias.double()
    # Of outputs near zero only float32's own error counts: that of the sum of magnitudes.
    atol = 1e-6 * k**0.5 + TOLERANCE[dtype] * 1e-3
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype], atol=atol * 10)
    alone = cpu.ops().dense_linear(x[-1:], weight, bias)
    assert torch.equal(alone[0], got[-1])


def test_dense_linear_reads_views(isa):
    big = torch.randn(9, 100).bfloat16()
    weight, x = big[1:, 3:53], torch.randn(2, 3, 50).bfloat16()
    assert torch.equal(cpu.ops().dense_linear(x, weight, None), cpu.ops().dense_linear(x, weight.contiguous(), None))
    assert cpu.ops().dense_linear(x[:0], weight, None).shape == (0, 3, 8)
    assert torch.equal(cpu.ops().dense_linear(x[..., :0], weight[:, :0], None), torch.zeros(2, 3, 8).bfloat16())
    for bad in (weight.T, weight[:, :49], weight[0]):
        with pytest.raises(RuntimeError):
            cpu.ops().dense_linear(x, bad, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 16, 64, 257, 2560])
@pytest.mark.parametrize("early", [False, True])
def test_rms_norm(isa, dtype, weight_dtype, size, early):
    x, residual = torch.randn(2, 5, size).to(dtype), torch.randn(2, 5, size).to(dtype)
    weight = torch.randn(size).to(weight_dtype)
    close(cpu.ops().rms_norm(x, weight, 1e-6, early), layers.naive_rms_norm(x, weight, 1e-6, early))
    y, total = cpu.ops().add_rms_norm(x, residual, weight, 1e-6, early)
    exact = x.float() + residual.float()
    assert torch.equal(total, exact.to(dtype))
    close(y, layers.naive_rms_norm(exact, weight, 1e-6, False).to(dtype))


def test_rms_norm_of_zeros_nan_and_nothing(isa):
    ones = torch.ones(40)
    assert torch.equal(cpu.ops().rms_norm(torch.zeros(2, 40), ones, 1e-6, False), torch.zeros(2, 40))
    x = torch.randn(3, 40).bfloat16()
    x[1, 39] = float("nan")
    y = cpu.ops().rms_norm(x, ones, 1e-6, False)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()
    assert cpu.ops().rms_norm(x[:0], ones, 1e-6, False).shape == (0, 40)
    with pytest.raises(RuntimeError, match="weight must be contiguous"):
        cpu.ops().rms_norm(x, ones[:39], 1e-6, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary"), [(64, 64), (128, 32), (80, 80), (6, 2), (10, 10)])
def test_rotary_embedding(isa, dtype, halves, head_dim, rotary):
    angles = torch.rand(50, rotary // 2) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    wide = torch.randn(9, 5 * head_dim).to(dtype)
    x = wide[:, head_dim : 4 * head_dim]  # as the queries in a merged projection's output
    positions = torch.randint(0, 50, (9,))
    expected, untouched = layers.naive_rotary_embedding(x, positions, cos_sin, head_dim, halves), wide.clone()
    cpu.ops().rotary_embedding_(x, positions, cos_sin, head_dim, halves)
    torch.testing.assert_close(x, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(wide[:, :head_dim], untouched[:, :head_dim])
    assert torch.equal(wide[:, 4 * head_dim :], untouched[:, 4 * head_dim :])
    with pytest.raises(RuntimeError, match="outside cos_sin"):
        cpu.ops().rotary_embedding_(x, positions + 50, cos_sin, head_dim, halves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 64, 6912])
def test_silu_and_mul(isa, dtype, size):
    x = (torch.randn(3, 2 * size) * 20).to(dtype)
    op = cpu.ops().silu_and_mul
    close(op(x), layers.naive_silu_and_mul(x))
    x[1, 0] = float("nan")
    assert op(x)[1, 0].isnan()
    assert op(x[:0]).shape == (0, size)


def test_silu_of_extremes(isa):
    x = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 1e30] + [1.0] * 6])
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.0, 88.0, 1e30]])
    torch.testing.assert_close(cpu.ops().silu_and_mul(x), expected, rtol=1e-6, atol=1e-35)


def test_opcheck():
    ops, check = cpu.ops(), torch.library.opcheck
    check(ops.paged_attention.default, (*paged([9, 4], [3, 1]), 1.0, -1, 0.0, True))
    x, weight = torch.randn(3, 2, 40).bfloat16(), torch.randn(7, 40).bfloat16()
    check(ops.dense_linear.default, (x, weight, torch.randn(7)))
    check(ops.rms_norm.default, (x, torch.randn(40), 1e-6, False))
    check(ops.add_rms_norm.default, (x, x.clone(), torch.randn(40), 1e-6, True))
    check(ops.rotary_embedding_.default, (x.view(6, 40), torch.arange(6), torch.randn(9, 8), 8, True))
    check(ops.silu_and_mul.default, (x,))
