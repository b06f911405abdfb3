"""Parts of a merged layer, joined in canonical form."""

from __future__ import annotations

import pytest
import torch

import sparse_backend as sb
from sparse_backend.formats import get_format
from sparse_backend.options import Options


def weights(format, rows, k=48):
    torch.manual_seed(sum(rows) + k)
    dense = torch.randn(sum(rows), k)
    if format == "ternary":
        dense = torch.randint(-1, 2, dense.shape) * torch.arange(1.0, 1 + sum(rows))[:, None]
    elif format == "nm":
        dense.view(-1, k // 4, 4)[..., 1:3] = 0
    elif format == "block":
        dense[:, 16:32] = 0
    elif format in ("bitmask", "sell"):
        dense[torch.rand(dense.shape) < 0.6] = 0
    return torch.split(dense.bfloat16(), rows)


KINDS = [
    ("bitmask", {}), ("bitmask", {"values": "int8"}), ("bitmask", {"values": "int4", "group_size": 64}),
    ("sell", {}), ("sell", {"values": "bf16"}), ("nm", {}), ("nm", {"values": "int8"}),
    ("block", {}), ("block", {"values": "int4", "group_size": 32}),
    ("bf16x12", {}), ("int8", {}), ("int4", {"group_size": 32}), ("ternary", {}), ("ternary", {"bits": 1.6}),
]  # fmt: skip


@pytest.mark.parametrize(("format", "options"), KINDS)
@pytest.mark.parametrize("rows", [(16, 32, 16), (32, 7), (48,)])
def test_joined_is_what_stands_one_under_the_other(format, options, rows):
    packed = [sb.pack(w, format, **options) for w in weights(format, rows)]
    joined = get_format(format).join(packed)
    if joined is None:
        assert options.get("values") == "int4"  # a part ended within a byte
        return
    assert joined.shape == (sum(rows), 48)
    expected = torch.cat([p.unpack() for p in packed])
    assert torch.equal(joined.unpack(), expected)
    x = torch.randn(3, 48)
    assert torch.equal(sb.linear(x, joined), torch.cat([sb.linear(x, p) for p in packed], dim=1))


def test_parts_that_end_within_a_block_or_a_byte_are_not_joined():
    blocks = [sb.pack(w, "block") for w in weights("block", (24, 16))]
    assert get_format("block").join(blocks) is None
    odd = torch.zeros(1, 8).bfloat16()
    odd[0, :3] = 1
    halves = [sb.pack(odd, "bitmask", values="int4", group_size=64) for _ in range(2)]
    assert get_format("bitmask").join(halves) is None
    assert get_format("bitmask").join(halves[:1]) is halves[0]


def test_parts_that_differ_in_kind_or_width_are_not_joined():
    a, b = weights("bitmask", (8, 8))
    assert get_format("bitmask").join([sb.pack(a, "bitmask"), sb.pack(b, "bitmask", values="int8")]) is None
    narrow = sb.pack(a[:, :16].contiguous(), "bitmask")
    assert get_format("bitmask").join([sb.pack(b, "bitmask"), narrow]) is None
    wide = sb.pack(a, "bf16x12"), sb.pack(b[:, :16].contiguous(), "bf16x12")
    assert get_format("bf16x12").join(wide) is None


def test_one_ternary_scale_for_all_parts_stays_one():
    codes = torch.randint(-1, 2, (8, 20)).bfloat16()
    form = get_format("ternary")
    same = form.join([form.pack(codes * 0.5, Options()), form.pack(codes * 0.5, Options())])
    assert same is not None
    assert same.tensors["scales"].shape == (1, 1)
    other = form.join([form.pack(codes * 0.5, Options()), form.pack(codes * 2, Options())])
    assert other is not None
    assert other.tensors["scales"].shape == (16, 1)


def test_bf16x12_parts_with_other_exponents_are_coded_again():
    small = torch.randn(4, 64).mul_(2.0**-30).bfloat16()
    large = torch.randn(4, 64).bfloat16()
    large[1, 5] = 2.0**60  # an escape
    parts = [sb.pack(w.repeat(64, 1), "bf16x12") for w in (small, large)]
    joined = get_format("bf16x12").join(parts)
    assert joined is not None
    assert torch.equal(joined.unpack(), torch.cat([p.unpack() for p in parts]))
    twice = get_format("bf16x12").join([parts[1], parts[1]])
    assert twice is not None
    assert torch.equal(twice.unpack(), parts[1].unpack().repeat(2, 1))


@pytest.mark.parametrize(("format", "options"), KINDS)
def test_a_machine_form_shares_no_memory_with_what_it_was_made_from(format, options):
    packed = [sb.pack(w, format, **options) for w in weights(format, (16, 32))]
    memory = torch.empty(1 << 16, dtype=torch.uint8)
    used = 0

    def empty(shape, dtype):
        nonlocal used
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        start, used = used, used + -(-nbytes // 64) * 64
        return memory[start : start + nbytes].view(dtype).view(shape)

    joined = get_format(format).join(packed, empty) or packed[0]  # int4 values that end within a byte
    x = torch.randn(2, 48)
    before = sb.linear(x, machine := joined.lower())
    for tensor in (memory, *(t for p in packed for t in p.tensors.values())):
        tensor.zero_()
    assert torch.equal(sb.linear(x, machine), before)
