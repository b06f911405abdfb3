"""Formats of the lanes kernels: bf16x12, int4, block."""

from __future__ import annotations

import pytest
import torch
from conftest import blocks_of_zeros, sparse_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from test_unstructured import nearest

import sparse_backend as sb
from sparse_backend.formats import get_format
from sparse_backend.formats.unstructured import LEVELS


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 40), k=st.integers(0, 300), scale=st.sampled_from([1.0, 1e-3, 1e30]), seed=st.integers(0, 99))
def test_bf16x12_is_bit_for_bit_the_weight(n, k, scale, seed):
    weight = (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()
    packed = sb.pack(weight, format="bf16x12")
    assert same_bits(packed.unpack(), weight)
    stored = n * (k + (k + 1) // 2) + 16
    assert packed.nbytes == stored + 12 * packed.tensors["escapes"].shape[0]


def test_bf16x12_keeps_signed_zeros_subnormals_and_rare_exponents():
    weight = torch.randn(64, 64).bfloat16()
    weight[0, :5] = torch.tensor([0.0, -0.0, 2.0**-130, -(2.0**-133), 3e38]).bfloat16()
    packed = sb.pack(weight, format="bf16x12")
    assert same_bits(packed.unpack(), weight)
    parts = [packed.shard(dim, i, 2).unpack() for dim in (0, 1) for i in (0, 1)]
    assert same_bits(torch.cat(parts[:2], 0), weight)
    assert same_bits(torch.cat(parts[2:], 1), weight)


def test_bf16x12_refuses_what_it_cannot_code():
    wild = (torch.randn(64, 512) * torch.logspace(-30, 30, 512)).bfloat16()
    with pytest.raises(sb.WeightError, match="rare exponents"):
        sb.pack(wild, format="bf16x12")
    assert get_format("bf16x12").candidates(wild, wild.numel(), sb.Options()) == []
    for bad in (float("nan"), float("inf")):
        weight = torch.randn(8, 8).bfloat16()
        weight[3, 3] = bad
        with pytest.raises(sb.WeightError, match="NaN or infinite"):
            sb.pack(weight, format="bf16x12")
    with pytest.raises(sb.WeightError, match="stores bfloat16"):
        sb.pack(torch.randn(8, 8).half(), format="bf16x12")


def test_damaged_bf16x12_tensors_are_refused():
    packed = sb.pack(torch.randn(16, 31).bfloat16(), format="bf16x12")
    good = packed.tensors
    outside = torch.tensor([[16, 0, 0]], dtype=torch.int32)
    for name, tensor in (
        ("low", good["low"][:-1]), ("high", good["high"][:, :-1]), ("exponents", good["exponents"][:-1]),
        ("escapes", outside), ("escapes", -outside), ("escapes", good["escapes"][:, :0]), ("low", good["low"].short()),
    ):  # fmt: skip
        with pytest.raises(sb.WeightError):
            sb.PackedWeight("bf16x12", (16, 31), torch.bfloat16, {**good, name: tensor}).unpack()


@pytest.mark.parametrize("group_size", [None, 32, 64, 256])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (20, 300), (3, 512)])
def test_int4_is_the_nearest_under_its_scale(group_size, shape):
    weight = torch.randn(shape).bfloat16()
    packed = sb.pack(weight, format="int4", group_size=group_size)
    assert torch.allclose(packed.unpack().float(), nearest(weight, 7, group_size or 128), rtol=2**-8, atol=1e-6)
    assert torch.equal(sb.pack(packed.unpack(), format="int4", group_size=group_size).tensors["weight"],
                       packed.tensors["weight"])  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 70), k=st.integers(0, 300), zeros=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    size=st.sampled_from([16, 32]), dtype=st.sampled_from([torch.bfloat16, torch.float16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_blocks_come_back_bit_for_bit(n, k, zeros, size, dtype, seed):
    weight = blocks_of_zeros(n, k, zeros, size, dtype, seed)
    packed = sb.pack(weight, format="block")
    assert torch.equal(packed.unpack(), weight)
    padded = torch.nn.functional.pad(weight, (0, -k % 16, 0, -n % 16)).view(-(-n // 16), 16, -(-k // 16), 16)
    stored = int((padded != 0).any(3).any(1).sum())
    assert packed.tensors["values"].shape == (stored, 16, 16)


@pytest.mark.parametrize("values", [None, "bf16", "bf16x12", *LEVELS])
@pytest.mark.parametrize(("dim", "count"), [(0, 3), (1, 2)])
def test_sharded_blocks_put_together_are_the_whole(values, dim, count):
    packed = sb.pack(blocks_of_zeros(48, 512, 0.7), format="block", values=values)
    parts = [packed.shard(dim, i, count) for i in range(count)]
    assert torch.equal(torch.cat([p.unpack() for p in parts], dim), packed.unpack())
    assert all(p.attributes == packed.attributes for p in parts)


@pytest.mark.parametrize("form", ["int4", "block"])
def test_groups_cannot_be_cut(form):
    packed = sb.pack(
        blocks_of_zeros(32, 192, 0.5), format=form, group_size=128, values=None if form == "int4" else "int4"
    )
    with pytest.raises(sb.WeightError, match="groups of 128"):
        packed.shard(1, 1, 2)


@pytest.mark.parametrize(("form", "values"), [("int4", None), ("block", None), ("block", "int8"), ("block", "int4")])
def test_damaged_tensors_are_refused(form, values):
    packed = sb.pack(blocks_of_zeros(40, 300, 0.5), format=form, values=values)
    good = packed.tensors
    wrong = {name: tensor[:-1] for name, tensor in good.items()}
    if "scales" in good:
        wrong["scales"] = torch.full_like(good["scales"], float("nan"))
    for name, tensor in wrong.items():
        with pytest.raises(sb.WeightError):
            sb.PackedWeight(form, (40, 300), torch.bfloat16, {**good, name: tensor}, packed.attributes)
    if form == "block":
        outside = good["blocks"] | torch.tensor([0, 0, 0x80], dtype=torch.uint8)
        with pytest.raises(sb.WeightError, match="past block column"):
            sb.PackedWeight(form, (40, 300), torch.bfloat16, {**good, "blocks": outside}, packed.attributes)
    with pytest.raises(sb.WeightError):
        sb.PackedWeight(form, (40, 300), torch.bfloat16, good, {"values": "int3", "group_size": 7, "activations": "x"})


def test_blocks_are_found_where_there_are_any():
    block = get_format("block")
    found = block.candidates(blocks_of_zeros(64, 640, 0.5, 32), 20480, sb.Options())
    assert {c.values for c in found} == {"bf16", "bf16x12"}
    assert all(c.stored < 64 * 640 for c in found)
    assert block.candidates(sparse_weight(64, 640, 0.5), 20480, sb.Options()) == []


@pytest.mark.parametrize("form", ["int4", "block", "bf16x12"])
def test_more_columns_than_a_strip_can_number(form):
    weight = torch.zeros(1, 65536 * 16 + 1, dtype=torch.bfloat16)
    with pytest.raises(sb.WeightError, match="holds up to"):
        sb.pack(weight, format=form)
