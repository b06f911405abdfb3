"""The canonical form: exact for any pattern, sized as promised, sharded like dense slices."""

from __future__ import annotations

import pytest
import torch
from conftest import sparse_weight
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_backend as sb

DTYPES = [torch.bfloat16, torch.float16]


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int16)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40),
    k=st.integers(0, 300),
    zeros=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_unpack_gives_back_every_bit(n, k, zeros, dtype, seed):
    weight = sparse_weight(n, k, zeros, dtype, seed)
    packed = sb.pack(weight)
    assert torch.equal(bits(packed.unpack()), bits(weight))
    assert packed.shape == (n, k)
    assert packed.nbytes == n * ((k + 7) // 8) + 2 * int(torch.count_nonzero(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_value_survives(dtype):
    everything = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = everything[torch.isfinite(everything)]
    weight = finite[: finite.numel() // 64 * 64].reshape(64, -1)
    expected = torch.where(weight == 0, torch.zeros_like(weight), weight)  # -0.0 comes back +0.0
    assert torch.equal(bits(sb.pack(weight).unpack()), bits(expected))


def test_negative_zero_counts_as_zero():
    packed = sb.pack(torch.tensor([[-0.0, 1.0, 0.0]], dtype=torch.bfloat16))
    assert packed.tensors["values"].numel() == 1
    assert torch.equal(bits(packed.unpack()), bits(torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.bfloat16)))


def test_strided_and_unaligned_views():
    base = sparse_weight(70, 131, 0.5)
    for view in (base.T, base[:, 1:], base[3:, ::2], base.flatten()[1 : 1 + 60 * 100].view(60, 100)):
        assert torch.equal(sb.pack(view).unpack(), view)


@pytest.mark.parametrize("zeros", [0.3, 0.5, 0.9])
def test_size_is_within_two_percent_canonical_and_machine(zeros):
    weight = sparse_weight(1024, 1024, zeros)
    promised = 2 * int(torch.count_nonzero(weight)) + weight.numel() / 8
    packed = sb.pack(weight)
    assert packed.nbytes <= 1.02 * promised
    assert packed.lower().nbytes <= 1.02 * promised
    assert packed.bits_per_weight == pytest.approx(8 * packed.nbytes / weight.numel())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_are_refused(bad, dtype):
    weight = sparse_weight(20, 33, 0.5, dtype)
    weight[7, 32] = bad
    with pytest.raises(sb.WeightError, match="1 NaN or infinite"):
        sb.pack(weight)


def test_what_cannot_be_packed_says_why():
    with pytest.raises(sb.WeightError, match="float32 weight would be rounded"):
        sb.pack(torch.ones(2, 2))
    with pytest.raises(sb.WeightError, match="two dimensions"):
        sb.pack(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(sb.WeightError, match="stores bfloat16, float16"):
        sb.pack(torch.ones(2, 2, dtype=torch.int8))
    with pytest.raises(sb.OptionError, match="allowed: auto, dense, bitmask"):
        sb.pack(torch.ones(2, 2, dtype=torch.bfloat16), format="bitmaks")
    with pytest.raises(sb.WeightError, match="overflow"):
        sb.pack(torch.full((2, 2), 1e30, dtype=torch.bfloat16), values="fp16")


def test_values_converts_when_asked():
    weight = torch.randn(8, 8)
    assert torch.equal(sb.pack(weight, values="fp16").unpack(), weight.half())


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_are_the_dense_slices_packed(dim, count):
    weight = sparse_weight(24, 136, 0.6)
    packed = sb.pack(weight)
    for index, part in enumerate(weight.chunk(count, dim)):
        shard, alone = packed.shard(dim, index, count), sb.pack(part.contiguous())
        assert shard.shape == alone.shape
        for name in alone.tensors:
            assert torch.equal(shard.tensors[name], alone.tensors[name])
    with pytest.raises(sb.WeightError, match="equal parts"):
        packed.shard(dim, 0, 5)


def test_damaged_tensors_are_refused():
    packed = sb.pack(sparse_weight(16, 70, 0.5))
    good = packed.tensors
    for name, tensor in (("values", good["values"][:-1]), ("mask", good["mask"][:-1]), ("mask", good["mask"].int())):
        with pytest.raises(sb.WeightError):
            sb.PackedWeight("bitmask", (16, 70), torch.bfloat16, {**good, name: tensor}).unpack()
    beyond = good["mask"].clone()
    beyond[0, -1] |= 0x80  # column 71 of 70
    with pytest.raises(sb.WeightError, match="past column 70"):
        sb.PackedWeight("bitmask", (16, 70), torch.bfloat16, {**good, "mask": beyond}).lower()
