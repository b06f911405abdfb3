"""`nm`: at most N nonzeros in every M consecutive columns: 2:4, 4:8, 8:16, 6:16 or 4:16.

Canonical form: a mask of one bit per weight, which for 2:4 is what two 2-bit positions per group of four cost too
(the form of NVIDIA's sparse tensor cores, Mishra et al., 2021) and less for larger M, and exactly N values per
group, so that rows are equally long. CPUs run it on the bitmask kernels: at N:M's densities those read weights
at the speed of memory, and a layout of positions would be no smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import WeightError
from ..options import NM_PATTERNS, Options
from ..packed import PackedWeight
from .base import Candidate
from .bitmask import Bitmask
from .lanes import join_bits
from .unstructured import LEVELS, quantise_groups, value_kinds

# Rows that are looked at before a whole weight is checked.
_SAMPLED_ROWS = 64
_SMALLEST_FIRST = sorted(NM_PATTERNS, key=lambda name: (NM_PATTERNS[name][0] / NM_PATTERNS[name][1], NM_PATTERNS[name]))


class Nm(Bitmask):
    """Tensors as Unstructured's, with N values for every whole group of M columns; attribute `pattern`.

    A group with fewer nonzeros stores zeros, in its first columns that are zero. A last, partial group of r columns
    stores min(N, r).
    """

    name = "nm"

    def candidates(self, weight: torch.Tensor, nnz: int, options: Options) -> list[Candidate]:
        n, k = weight.shape
        if options.format != self.name and not 0.25 * weight.numel() <= nnz <= 0.5 * weight.numel() + n:
            return []  # another format holds so few, or so many, better
        pattern = find_pattern(weight)
        if pattern is None:
            return []
        stored = n * _stored_per_row(k, pattern)
        return self._candidates(weight, stored, options, value_kinds(weight, options))

    def pack(self, weight: torch.Tensor, options: Options) -> PackedWeight:
        from ..kernels import cpu

        self.check_weight(weight)
        # What pruning was asked for, unless an engine merged it with another pattern or cut it between groups.
        asked = options.pattern in NM_PATTERNS and _fits(weight, options.pattern)
        pattern = options.pattern if asked else find_pattern(weight)
        if pattern is None:
            raise WeightError(f"nm: groups of columns hold more nonzeros than any of {', '.join(NM_PATTERNS)} allows")
        with cpu.as_weight_error():  # NaN and Inf
            cpu.ops().bitmask_pack(weight)
        kept = _kept(weight, pattern)
        mask = join_bits(kept)
        shape = (weight.shape[0], weight.shape[1])
        if options.values in LEVELS:
            group_size = self._group_size(options)
            codes, scales = quantise_groups(weight, LEVELS[options.values], group_size)
            attributes: dict[str, Any] = {
                "values": options.values, "group_size": group_size, "activations": options.activations or "keep",
                "pattern": pattern,
            }  # fmt: skip
            return self._from_codes(mask, codes[kept], scales, weight.dtype, attributes, shape)
        attributes = {"pattern": pattern}
        if options.values in ("bf16", "bf16x12"):
            attributes["values"] = options.values
        values = weight.contiguous()[kept]
        return PackedWeight(self.name, shape, values.dtype, {"mask": mask, "values": values}, attributes)

    def shard(self, packed: PackedWeight, dim: int, index: int, count: int) -> PackedWeight:
        part = self.part(packed.shape[dim], index, count)
        pattern = packed.attributes["pattern"]
        if dim == 1 and part.start % NM_PATTERNS[pattern][1]:
            raise WeightError(f"cannot cut columns at {part.start}: {pattern} has groups of {NM_PATTERNS[pattern][1]}")
        return super().shard(packed, dim, index, count)

    def _again(self, weight: torch.Tensor, attributes: Mapping[str, Any]) -> PackedWeight:
        return self.pack(weight, Options(values=attributes.get("values"), pattern=attributes["pattern"]))

    def validate(self, packed: PackedWeight) -> None:
        pattern = packed.attributes.get("pattern")
        if pattern not in NM_PATTERNS:
            raise WeightError(f"nm: attributes {packed.attributes} are not those of this format")
        super().validate(packed)
        k = packed.shape[1]
        rows = _bits_per_row(packed.tensors["mask"])
        if not bool((rows == _stored_per_row(k, pattern)).all()):
            raise WeightError(f"nm: the mask does not store {pattern} in every row")


def find_pattern(weight: torch.Tensor) -> str | None:
    """Of the patterns that a weight [N, K] fits, the finest that stores least; or None."""
    if not weight.numel():
        return None
    sample = weight[:: max(1, weight.shape[0] // _SAMPLED_ROWS)]
    for pattern in _SMALLEST_FIRST:
        if _fits(sample, pattern) and _fits(weight, pattern):
            return pattern
    return None


def _groups(weight: torch.Tensor, m: int) -> torch.Tensor:
    """Which weights are not zero, bool [N, ceil(K / m), m]."""
    padded = torch.nn.functional.pad(weight != 0, (0, -weight.shape[1] % m))
    return padded.view(weight.shape[0], -1 if weight.shape[0] else 0, m)


def _fits(weight: torch.Tensor, pattern: str) -> bool:
    n, m = NM_PATTERNS[pattern]
    rows = max(1, (1 << 23) // max(1, weight.shape[1]))
    return all(
        bool((_groups(weight[start : start + rows], m).sum(2, dtype=torch.uint8) <= n).all())
        for start in range(0, weight.shape[0], rows)  # bounded scratch memory, whatever N is
    )


def _stored_per_row(k: int, pattern: str) -> int:
    n, m = NM_PATTERNS[pattern]
    return k // m * n + min(n, k % m)


def _kept(weight: torch.Tensor, pattern: str) -> torch.Tensor:
    """What is stored, bool [N, K]: the nonzeros, and zeros where a group has too few."""
    n, m = NM_PATTERNS[pattern]
    rows, k = weight.shape
    out = torch.empty(rows, k, dtype=torch.bool)
    step = max(1, (1 << 21) // max(1, k))
    for start in range(0, rows, step):
        nonzero = _groups(weight[start : start + step], m)
        missing = n - nonzero.sum(2, keepdim=True, dtype=torch.int16)
        # The first zeros of each group, as many as are missing.
        zeros_before = (~nonzero).cumsum(2, dtype=torch.int16)
        kept = nonzero | (~nonzero & (zeros_before <= missing))
        out[start : start + step] = kept.flatten(1)[:, :k]
    return out


def _bits_per_row(mask: torch.Tensor) -> torch.Tensor:
    rows = torch.zeros(mask.shape[0], dtype=torch.int64)
    for bit in range(8):
        rows += ((mask >> bit) & 1).sum(1, dtype=torch.int64)
    return rows
