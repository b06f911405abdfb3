"""`bf16x12`: dense bf16 weights in 12 bits, bit by bit the same.

Trained weights use few of bf16's 256 exponents: a 4-bit code names one of the 15 most frequent, sign and
mantissa stay 8 bits, and the rest, at most 1 in 1000, is listed. (Splitting off exponents that
compress is the idea of DFloat11, Zhang et al., 2025, which codes them with variable length; a fixed
length keeps a kernel at the speed of memory.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import UnfitError, WeightError
from ..options import Options
from ..packed import MachineWeight, PackedWeight
from .base import Candidate, Empty, Format, TensorSpec, stack
from .lanes import MAX_COLUMNS, check_columns

MOST_ESCAPES = 1e-3
# A share of one row in so many is looked at before a whole weight is coded.
_SAMPLED_ROWS = 64


class Bf16x12(Format):
    """Tensors: `low` [N, K], mantissa and sign; `high` [N, ceil(K / 2)], exponent codes; `exponents`; `escapes`."""

    name = "bf16x12"
    dtypes = (torch.bfloat16,)
    tensors = (
        TensorSpec("low", torch.uint8, 2, "[N, K]"),
        TensorSpec("high", torch.uint8, 2, "[N, ceil(K / 2)]"),
        TensorSpec("exponents", torch.uint8, 1, "[16]"),
        TensorSpec("escapes", torch.int32, 2, "[escapes, 3]: row, column, bits"),
    )

    def candidates(self, weight: torch.Tensor, nnz: int, options: Options) -> list[Candidate]:
        n, k = weight.shape
        if options.values not in (None, "bf16", "bf16x12") or k > MAX_COLUMNS or not _few_exponents(weight):
            return []
        nbytes = n * (k + (k + 1) // 2) + 16
        return [Candidate(nbytes, lambda: self.pack(weight, options), "bf16x12", n * k)]

    def pack(self, weight: torch.Tensor, options: Options) -> PackedWeight:
        self.check_weight(weight)
        check_columns(self.name, weight.shape[1])
        packed = self._encode(weight)
        escapes = packed.tensors["escapes"]
        if escapes.shape[0] > MOST_ESCAPES * max(weight.numel(), 1000):
            raise UnfitError(
                f"bf16x12: {escapes.shape[0]} of {weight.numel()} weights have rare exponents, more than 1 in "
                f"{1 / MOST_ESCAPES:.0f}; leave it dense"
            )
        return packed

    def _encode(self, weight: torch.Tensor) -> PackedWeight:
        from ..kernels import cpu

        with cpu.as_weight_error():
            low, high, exponents, escapes = cpu.ops().bf16x12_encode(weight)
        tensors = {"low": low, "high": high, "exponents": exponents, "escapes": escapes}
        return PackedWeight(self.name, (weight.shape[0], weight.shape[1]), weight.dtype, tensors)

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        from ..kernels import cpu

        t = packed.tensors
        with cpu.as_weight_error():
            dense: torch.Tensor = cpu.ops().bf16x12_decode(t["low"], t["high"], t["exponents"], t["escapes"])
        return dense

    def lower(self, packed: PackedWeight) -> MachineWeight:
        from ..kernels import cpu

        check_columns(self.name, packed.shape[1])
        t = packed.tensors
        with cpu.as_weight_error():
            buffer = cpu.ops().bf16x12_lower(t["low"], t["high"], t["exponents"], t["escapes"])
        return MachineWeight(self.name, packed.shape, packed.dtype, {"packed": buffer})

    def shard(self, packed: PackedWeight, dim: int, index: int, count: int) -> PackedWeight:
        part = self.part(packed.shape[dim], index, count)
        dense = packed.unpack()
        return self._encode((dense[part] if dim == 0 else dense[:, part]).contiguous())

    def join(self, parts: Sequence[PackedWeight], empty: Empty = torch.empty) -> PackedWeight | None:
        tables = [p.tensors["exponents"] for p in parts]
        if len(parts) == 1 or any(p.shape[1] != parts[0].shape[1] for p in parts):
            return parts[0] if len(parts) == 1 else None
        if not all(torch.equal(tables[0], table) for table in tables):
            return self._encode(torch.cat([self.unpack(p) for p in parts]))
        first, escapes = 0, []
        for p in parts:
            escapes.append(p.tensors["escapes"] + torch.tensor([first, 0, 0], dtype=torch.int32))
            first += p.shape[0]
        tensors = {name: stack([p.tensors[name] for p in parts], empty) for name in ("low", "high")}
        tensors |= {"exponents": tables[0], "escapes": torch.cat(escapes)}
        return PackedWeight(self.name, (first, parts[0].shape[1]), parts[0].dtype, tensors)

    def validate(self, packed: PackedWeight) -> None:
        super().validate(packed)
        n, k = packed.shape
        expected = {"low": (n, k), "high": (n, (k + 1) // 2), "exponents": (16,)}
        for name, shape in expected.items():
            if tuple(packed.tensors[name].shape) != shape:
                got = tuple(packed.tensors[name].shape)
                raise WeightError(f"bf16x12: shape {packed.shape} needs {name} {shape}, got {got}")
        if packed.tensors["escapes"].shape[1:] != (3,):
            raise WeightError("bf16x12: escapes must be [escapes, 3]")


def _few_exponents(weight: torch.Tensor) -> bool:
    """Whether a sample of rows can be coded; if the rest then cannot, packing says so and the plan chooses again."""
    if weight.numel() == 0:
        return False
    rows = weight[:: max(1, weight.shape[0] // _SAMPLED_ROWS)]
    exponents = (rows.contiguous().view(torch.int16).view(-1).int() >> 7) & 255
    counts = torch.bincount(exponents, minlength=256)
    rare = counts.sum() - counts.topk(15).values.sum()
    return bool(rare <= MOST_ESCAPES / 2 * exponents.numel()) and not bool(counts[255])
