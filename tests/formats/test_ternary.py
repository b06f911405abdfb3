"""Ternary and int8: round trips, what is found, what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_backend as sb
from sparse_backend.formats.ternary import absmean

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def ternary_weight(n, k, scales="row", dtype=torch.bfloat16, group=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (n, k), generator=g).to(dtype)
    if scales == "tensor":
        return codes * 0.0203
    if scales == "row":
        return codes * (torch.rand(n, 1, generator=g) + 0.5).to(dtype)
    factors = (torch.rand(n, -(-k // group), generator=g) + 0.5).to(dtype)
    return codes * factors.repeat_interleave(group, dim=1)[:, :k]


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 400),
    scales=st.sampled_from(["tensor", "row", "group"]),
    group=st.sampled_from([32, 64, 128, 256]),
    bits=st.sampled_from([2, 1.6]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_round_trip_is_exact(n, k, scales, group, bits, dtype, seed):
    weight = ternary_weight(n, k, scales, dtype, group, seed)
    packed = sb.pack(weight, "ternary", bits=bits)
    assert torch.equal(packed.unpack(), weight)
    assert not torch.signbit(packed.unpack()[weight == 0]).any()
    for dim in (0, 1):
        if packed.shape[dim] % 2 == 0 and (dim == 0 or not packed.attributes["group_size"]):
            parts = [packed.shard(dim, i, 2).unpack() for i in range(2)]
            assert torch.equal(torch.cat(parts, dim), weight)


@pytest.mark.parametrize(("bits", "limit"), [(2, 2.03), (1.6, 1.63)])
@pytest.mark.parametrize("scales", ["tensor", "row", "group"])
@pytest.mark.parametrize("shape", [(1024, 1024), (1040, 1152), (1024, 1920), (2560, 6912)])
def test_size_of_canonical_and_machine_form(bits, limit, scales, shape):
    packed = sb.pack(ternary_weight(*shape, scales, group=128), "ternary", bits=bits)
    allowed = limit + (16 / 128 if scales == "group" else 0)
    assert packed.bits_per_weight <= allowed
    assert 8 * packed.lower().nbytes / (shape[0] * shape[1]) <= allowed


def test_scales_are_found_as_coarse_as_they_are():
    assert sb.pack(ternary_weight(8, 300, "tensor"), "ternary").tensors["scales"].shape == (1, 1)
    assert sb.pack(ternary_weight(8, 300, "row"), "ternary").tensors["scales"].shape == (8, 1)
    for group in (32, 64, 128, 256):
        packed = sb.pack(ternary_weight(8, 700, "group", group=group), "ternary")
        assert packed.attributes["group_size"] == group
        assert packed.tensors["scales"].shape == (8, -(-700 // group))


def test_rows_and_weights_of_zeros_and_empty_ones():
    weight = ternary_weight(6, 100, "tensor")
    weight[2] = 0
    packed = sb.pack(weight, "ternary")
    assert packed.tensors["scales"].shape == (1, 1)
    assert torch.equal(packed.unpack(), weight)
    for shape in ((4, 50), (0, 5), (5, 0), (0, 0)):
        zeros = torch.zeros(shape, dtype=torch.bfloat16)
        packed = sb.pack(zeros, "ternary")
        assert torch.equal(packed.unpack(), zeros)
        assert torch.equal(sb.linear(torch.ones(3, shape[1]), packed), torch.zeros(3, shape[0]))


def test_any_other_weight_is_rounded_by_the_absmean_rule():
    weight = torch.randn(48, 200)
    expected = (weight / weight.abs().mean()).round().clamp(-1, 1) * weight.abs().mean()
    assert torch.allclose(sb.pack(weight, "ternary").unpack(), expected, rtol=1e-6)
    grouped = sb.pack(weight, "ternary", group_size=64).unpack()
    for start in range(0, 200, 64):
        part = weight[:, start : start + 64]
        scale = part.abs().mean(dim=1, keepdim=True)
        assert torch.allclose(grouped[:, start : start + 64], (part / scale).round().clamp(-1, 1) * scale, rtol=1e-5)


def test_absmean_is_transformers_rule():
    from transformers.integrations.bitnet import WeightQuant

    with torch._dynamo.config.patch(disable=True):  # the same arithmetic, without waiting for a compiler
        for dtype in DTYPES:
            weight = (torch.randn(64, 96) * 0.02).to(dtype)
            assert torch.equal(absmean(weight), WeightQuant.apply(weight))


def test_auto_finds_ternary_and_only_ternary():
    linear = torch.nn.Linear(512, 64, bias=False)
    linear.weight.data = ternary_weight(64, 512, "row").float()
    layer = sb.SparseLinear.from_linear(linear.bfloat16())
    assert layer.format == "ternary"
    almost = ternary_weight(64, 512, "row")
    almost[3, 7] = 0.1
    linear.weight.data = almost
    assert sb.SparseLinear.from_linear(linear).format in ("bitmask", "bf16x12")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", ["ternary", "int8"])
def test_values_that_are_no_numbers_are_refused(bad, format):
    for weight in (ternary_weight(5, 70), torch.randn(5, 70).bfloat16()):
        weight[2, 3] = bad
        with pytest.raises(sb.WeightError, match="NaN or infinite"):
            sb.pack(weight, format)


@pytest.mark.parametrize(
    ("bits", "byte", "text"), [(2, 0b11000000, "3 in two bits"), (1.6, 243, "243 to 255"), (1.6, 255, "243 to 255")]
)
def test_codes_that_do_not_exist_are_refused(bits, byte, text):
    packed = sb.pack(ternary_weight(8, 40), "ternary", bits=bits)
    packed.tensors["codes"][3, 2] = byte
    for use in (packed.unpack, packed.lower):
        with pytest.raises(sb.WeightError, match=text):
            use()


def test_codes_past_the_last_column_are_refused():
    packed = sb.pack(ternary_weight(8, 41), "ternary")
    packed.tensors["codes"][0, -1] |= 0b100
    with pytest.raises(sb.WeightError, match="past the last column"):
        packed.unpack()


@pytest.mark.parametrize(
    "change",
    [
        {"attributes": {}},
        {"attributes": {"bits": 3, "group_size": 0, "activations": "keep"}},
        {"attributes": {"bits": 2, "group_size": 48, "activations": "keep"}},
        {"attributes": {"bits": 1.6, "group_size": 0, "activations": "keep"}},
        {"scales": torch.ones(7, 1, dtype=torch.bfloat16)},
        {"scales": torch.ones(8, 2, dtype=torch.bfloat16)},
        {"scales": torch.full((8, 1), float("nan"), dtype=torch.bfloat16)},
        {"scales": torch.full((8, 1), -1.0, dtype=torch.bfloat16)},
        {"codes": torch.zeros(8, 9, dtype=torch.uint8)},
        {"codes": torch.zeros(8, 10, dtype=torch.int8)},
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(change):
    packed = sb.pack(ternary_weight(8, 40), "ternary")
    attributes = change.pop("attributes", packed.attributes)
    with pytest.raises(sb.WeightError):
        sb.PackedWeight("ternary", (8, 40), torch.bfloat16, {**packed.tensors, **change}, attributes)


def test_rows_longer_than_int32_sums_allow_are_refused():
    packed = sb.pack(ternary_weight(2, 65537, "tensor"), "ternary")
    with pytest.raises(sb.WeightError, match="up to 65536 columns"):
        packed.lower()


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rounds_to_half_a_step(dtype):
    weight = torch.randn(33, 130).to(dtype)
    weight[5] = 0
    packed = sb.pack(weight, "int8")
    step = weight.float().abs().amax(1, keepdim=True) / 127
    slack = weight.float().abs() * 2**-8  # unpack() rounds to the weight's dtype
    assert ((packed.unpack().float() - weight.float()).abs() <= 0.5001 * step + slack).all()
    assert packed.bits_per_weight == 8 + 32 / 130
    assert torch.equal(torch.cat([packed.shard(0, i, 3).unpack() for i in range(3)]), packed.unpack())
    assert torch.equal(torch.cat([packed.shard(1, i, 2).unpack() for i in range(2)], 1), packed.unpack())
