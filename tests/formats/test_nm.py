"""Format nm: 2:4, 4:8 and 8:16."""

from __future__ import annotations

import pytest
import torch
from conftest import sparse_weight
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_backend as sb
from sparse_backend.compiler import plan, prune
from sparse_backend.formats import get_format, naive_linear
from sparse_backend.formats.nm import find_pattern
from sparse_backend.options import NM_PATTERNS


def pruned(n, k, pattern, seed=0, dtype=torch.bfloat16):
    weight = sparse_weight(n, k, 0.1, dtype, seed)  # some zeros of its own: groups with too few
    return prune.magnitude(weight, 0.5, pattern)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 20), k=st.integers(1, 100), pattern=st.sampled_from(list(NM_PATTERNS)),
    values=st.sampled_from([None, "bf16x12"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_weights_come_back_bit_for_bit(n, k, pattern, values, seed):
    weight = pruned(n, k, pattern, seed)
    packed = get_format("nm").pack(weight, sb.Options(values=values, pattern=pattern))
    assert torch.equal(packed.unpack(), weight)
    kept, m = NM_PATTERNS[pattern]
    assert packed.tensors["values"].numel() == n * (k // m * kept + min(kept, k % m))


@pytest.mark.parametrize("pattern", list(NM_PATTERNS))
@pytest.mark.parametrize("values", [None, "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_products(isa, pattern, values, tokens):
    packed = sb.pack(pruned(33, 512, pattern), format="nm", values=values)
    assert packed.attributes["pattern"] in NM_PATTERNS
    x = torch.randn(tokens, 512).bfloat16()
    assert torch.allclose(sb.linear(x, packed).double(), naive_linear(x, packed), rtol=2e-2, atol=0.2)


@pytest.mark.parametrize("values", [None, "bf16x12", "int8", "int4"])
@pytest.mark.parametrize(("dim", "count"), [(0, 3), (1, 2)])
def test_shards_put_together_are_the_whole(values, dim, count):
    packed = sb.pack(pruned(24, 512, "4:8"), format="nm", values=values)
    parts = [packed.shard(dim, i, count) for i in range(count)]
    assert torch.equal(torch.cat([p.unpack() for p in parts], dim), packed.unpack())
    assert all(p.attributes == packed.attributes for p in parts)
    with pytest.raises(sb.WeightError, match="groups of 8"):
        sb.pack(pruned(24, 24, "4:8"), format="nm", values=values).shard(1, 1, 2)


def test_the_finest_pattern_is_found_and_the_plan_takes_it():
    for pattern in NM_PATTERNS:
        weight = pruned(64, 512, pattern)
        assert find_pattern(weight) == pattern
    full = prune.magnitude(torch.randn(64, 512).bfloat16(), 0.5, "2:4")
    assert plan.choose(full, sb.Options()).format in ("nm", "sell")
    assert "nm" in {p.format for p in plan.choose(full, sb.Options()).predictions}
    assert find_pattern(sparse_weight(64, 512, 0.5)) is None
    with pytest.raises(sb.WeightError, match="more nonzeros than any of"):
        sb.pack(sparse_weight(64, 512, 0.3), format="nm")


def test_a_weight_merged_from_other_patterns_is_packed_by_what_it_is():
    """Engines merge projections: the layer has the options of its first part."""
    merged = torch.cat([pruned(16, 64, "2:4"), pruned(16, 64, "4:8", seed=1)])
    packed = get_format("nm").pack(merged, sb.Options(pattern="2:4"))
    assert packed.attributes["pattern"] == "4:8"
    assert torch.equal(packed.unpack(), merged)


def test_damage_is_refused():
    packed = sb.pack(pruned(16, 64, "2:4"), format="nm")
    good = packed.tensors
    moved = good["mask"].clone()
    moved[0], moved[1] = 0, 0xFF  # as many bits, not as many per row
    for tensors, attributes in (
        ({**good, "mask": moved}, packed.attributes), ({**good, "values": good["values"][:-1]}, packed.attributes),
        (good, {}), (good, {"pattern": "1:2"}), (good, {"pattern": "2:4", "values": "int3"}),
    ):  # fmt: skip
        with pytest.raises(sb.WeightError):
            sb.PackedWeight("nm", (16, 64), torch.bfloat16, tensors, attributes).lower()
    for bad in (float("nan"), float("inf")):
        weight = pruned(8, 32, "2:4")
        weight[3, 3] = bad
        with pytest.raises(sb.WeightError):
            sb.pack(weight, format="nm")
