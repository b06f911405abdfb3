"""What bitmask and sell share: kinds of values, sharding, damage."""

from __future__ import annotations

import pytest
import torch
from conftest import sparse_weight
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_backend as sb
from sparse_backend.formats.unstructured import LEVELS

FORMATS = ["bitmask", "sell"]
FLOATS = [None, "bf16", "bf16x12"]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 40),
    k=st.integers(0, 300),
    zeros=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    form=st.sampled_from(FORMATS),
    values=st.sampled_from(FLOATS),
    seed=st.integers(0, 1000),
)
def test_float_values_come_back_bit_for_bit(n, k, zeros, form, values, seed):
    weight = sparse_weight(n, k, zeros, torch.bfloat16, seed)
    packed = sb.pack(weight, format=form, values=values)
    assert torch.equal(packed.unpack().view(torch.int16), weight.view(torch.int16))
    assert packed.nbytes == n * ((k + 7) // 8) + 2 * int(torch.count_nonzero(weight))


def nearest(weight, levels, group):
    """The rounding by definition: one row and group at a time, scale from the largest magnitude."""
    out = weight.float().clone()
    for row in out:
        for part in row.split(group or max(1, row.numel())):
            scale = part.abs().max() / levels
            if scale > 0:
                part.copy_((part / scale).round() * scale)
    return out


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("values", list(LEVELS))
@pytest.mark.parametrize("group_size", [None, 128, 256])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (20, 300), (3, 512)])
def test_integer_values_are_the_nearest_under_their_scale(form, values, group_size, shape):
    weight = sparse_weight(*shape, 0.6)
    packed = sb.pack(weight, format=form, values=values, group_size=group_size)
    group = group_size or (128 if values == "int4" else 0)
    assert torch.allclose(packed.unpack().float(), nearest(weight, LEVELS[values], group), rtol=2**-8, atol=1e-6)
    assert ((packed.unpack() != 0) <= (weight != 0)).all()  # blind to the zeros: they stay


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("values", [*FLOATS, *LEVELS])
@pytest.mark.parametrize(("dim", "count"), [(0, 3), (1, 2)])
def test_shards_put_together_are_the_whole(form, values, dim, count):
    packed = sb.pack(sparse_weight(24, 512, 0.7), format=form, values=values)
    parts = [packed.shard(dim, i, count) for i in range(count)]
    assert torch.equal(torch.cat([p.unpack() for p in parts], dim), packed.unpack())
    assert all(p.attributes == packed.attributes for p in parts)


def test_groups_cannot_be_cut():
    packed = sb.pack(sparse_weight(8, 192, 0.5), values="int8", group_size=128)
    with pytest.raises(sb.WeightError, match="groups of 128"):
        packed.shard(1, 1, 2)
    with pytest.raises(sb.OptionError, match="sell has groups of 128, 256 columns"):
        sb.pack(sparse_weight(8, 192, 0.9), format="sell", values="int8", group_size=64)
    with pytest.raises(sb.OptionError, match="bitmask has groups of 64, 128, 256 columns"):
        sb.pack(sparse_weight(8, 192, 0.5), values="int4", group_size=32)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("values", list(LEVELS))
def test_damaged_integer_tensors_are_refused(form, values):
    packed = sb.pack(sparse_weight(16, 300, 0.5), format=form, values=values)
    good = packed.tensors
    nan = torch.full_like(good["scales"], float("nan"))
    for name, tensor in (
        ("values", good["values"][:-3]),
        ("mask", good["mask"][:-1]),
        ("scales", good["scales"][:-1]),
        ("scales", nan),
        ("values", good["values"].int()),
    ):
        with pytest.raises(sb.WeightError):
            sb.PackedWeight(form, (16, 300), torch.bfloat16, {**good, name: tensor}, packed.attributes).lower()
    for wrong in (
        {"values": "int3"},
        {**packed.attributes, "group_size": 7},
        {**packed.attributes, "activations": "x"},
    ):
        with pytest.raises(sb.WeightError):
            sb.PackedWeight(form, (16, 300), torch.bfloat16, good, wrong)


def test_coded_exponents_make_the_machine_form_smaller():
    weight = sparse_weight(256, 4096, 0.5)
    nnz = int(torch.count_nonzero(weight))
    raw, coded = (sb.pack(weight, values=v).lower().nbytes for v in ("bf16", "bf16x12"))
    assert coded < raw - 0.45 * nnz / 2  # half a byte less per value, but for escapes
    # Exponents all over: coding would need too many escapes, so values stay as they are.
    wild = (weight.float() * torch.logspace(-30, 30, 4096)).bfloat16()
    assert sb.pack(wild, values="bf16x12").lower().nbytes == sb.pack(wild, values="bf16").lower().nbytes


def test_options_that_contradict_are_named():
    with pytest.raises(sb.OptionError, match="'values' and 'format'"):
        sb.Options(format="ternary", values="int4")
    with pytest.raises(sb.OptionError, match="'group_size' and 'format'"):
        sb.Options(values="bf16", group_size=128)
    assert sb.Options(values="int4", group_size=128).group_size == 128
