"""`ternary`: weights -1, 0, 1 times a scale, at 2 or 1.6 bits.

Lossless for weights that are ternary already (BitNet b1.58, Ma et al., 2024; TriLM, Kaushal et
al., 2024): one scale for the weight, one per output row, or one per group of columns. `round`
makes any weight ternary by BitNet's absmean rule, which loses nearly everything in a model not
trained for it. The machine form is our own, see csrc/lowbit/layout.h.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch

from ..errors import WeightError
from ..options import GROUP_SIZES, Options
from ..packed import MachineWeight, PackedWeight
from .base import Candidate, Empty, Format, TensorSpec

MAX_COLUMNS = 65536  # what the kernels' int32 sums hold; lowering a longer row is an error
_PER_BYTE = {2: 4, 1.6: 5}
# int8 numbers an activation becomes: exact enough to stand for fp32 sums, or BitNet's rule.
_LIMBS = {"keep": 3, "int8": 1}


def absmean(weight: torch.Tensor, group_size: int | None = None) -> torch.Tensor:
    """Round to ternary by the absmean rule, as transformers does for BitNet checkpoints.

    Args:
        weight: [N, K], any float dtype.
        group_size: columns that share a scale; None for one scale for all.

    Returns:
        [N, K] of the same dtype: round(w / mean|w|), cut to -1..1, times mean|w|.

    Raises:
        WeightError: the weight holds NaN or Inf.
    """
    if not torch.isfinite(weight).all():
        raise WeightError("weight has NaN or infinite values")
    if weight.numel() == 0:
        return weight.clone()
    if group_size is None:
        full = weight.float()
        scale = 1.0 / full.abs().mean().clamp_(min=1e-5)
        return ((full * scale).round().clamp(-1, 1) / scale).to(weight.dtype)
    n, k = weight.shape
    padding = -k % group_size
    groups = torch.nn.functional.pad(weight.float(), (0, padding)).view(n, -1, group_size)
    count = torch.full((groups.shape[1],), group_size)
    count[-1] -= padding
    scale = 1.0 / (groups.abs().sum(-1) / count).clamp_(min=1e-5).unsqueeze(-1)
    rounded = (groups * scale).round().clamp(-1, 1) / scale
    return rounded.view(n, -1)[:, :k].to(weight.dtype).contiguous()


def _scan(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """(codes [N, K], scales [1 or N, groups], group_size or 0), or None if the weight is not ternary."""
    from ..kernels import cpu

    if weight.numel() == 0:
        return torch.zeros(weight.shape, dtype=torch.int8), weight.new_zeros(1, 1), 0
    with cpu.as_weight_error():
        for group_size in (0, *(g for g in reversed(GROUP_SIZES["ternary"]) if g < weight.shape[1])):
            ternary, codes, scales = cpu.ops().ternary_scan(weight, group_size)
            if ternary:
                return codes, _shared(scales), group_size
    return None


def _shared(scales: torch.Tensor) -> torch.Tensor:
    """One scale [1, 1] where all rows have the same; rows of zeros agree with any."""
    if scales.shape[1] != 1 or scales.numel() == 0:
        return scales
    largest = scales.max()
    same = ((scales == largest) | (scales == 0)).all()
    return largest.view(1, 1) if same else scales


class Ternary(Format):
    """Tensors: `codes` [N, ceil(K / 4 or 5)] uint8, `scales` [1, 1], [N, 1] or [N, ceil(K / group_size)].

    A code is w + 1: four per byte, lowest bits first, or five as base-3 digits, least significant
    first. Attributes: `bits` (2, 1.6), `group_size` (0: none), `activations` (keep, int8).
    """

    name = "ternary"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    tensors = (
        TensorSpec("codes", torch.uint8, 2, "[N, ceil(K / 4)] or, at 1.6 bits, [N, ceil(K / 5)]"),
        TensorSpec("scales", None, 2, "[1, 1], [N, 1] or [N, ceil(K / group_size)]"),
    )

    def candidates(self, weight: torch.Tensor, nnz: int, options: Options) -> list[Candidate]:
        found = _scan(weight) if weight.shape[1] <= MAX_COLUMNS and options.values not in ("int8", "int4") else None
        if found is None:
            return []
        codes, scales, group_size = found
        return [
            Candidate(
                weight.shape[0] * -(-weight.shape[1] // _PER_BYTE[bits]) + scales.nbytes,
                partial(self.from_codes, codes, scales, group_size, dataclasses.replace(options, bits=bits)),
                f"{bits} int8" if options.activations == "int8" else str(bits), weight.numel(),
            )
            for bits in ((2, 1.6) if options.bits is None else (options.bits,))
        ]  # fmt: skip

    def round(self, weight: torch.Tensor, options: Options) -> torch.Tensor:
        return weight if _scan(weight) is not None else absmean(weight, options.group_size)

    def pack(self, weight: torch.Tensor, options: Options) -> PackedWeight:
        self.check_weight(weight)
        found = _scan(weight)
        if found is None:
            bad = int((~torch.isfinite(weight)).sum())
            if bad:
                raise WeightError(f"weight has {bad} NaN or infinite value(s)")
            raise WeightError("weight is not ternary: more than one magnitude in a row or group of columns")
        codes, scales, group_size = found
        return self.from_codes(codes, scales, group_size, options)

    def from_codes(self, codes: torch.Tensor, scales: torch.Tensor, group_size: int, options: Options) -> PackedWeight:
        """Pack codes [N, K] int8 of -1, 0, 1 and their scales (shapes as the class says).

        Raises:
            WeightError: other codes, or scales of another shape.
        """
        from ..kernels import cpu

        bits = options.bits or 2
        attributes = {"bits": bits, "group_size": group_size, "activations": options.activations or "keep"}
        with cpu.as_weight_error():
            packed = cpu.ops().ternary_encode(codes, _PER_BYTE[bits])
        shape = (codes.shape[0], codes.shape[1])
        return PackedWeight(self.name, shape, scales.dtype, {"codes": packed, "scales": scales}, attributes)

    def rescale(self, packed: PackedWeight, scales: torch.Tensor) -> PackedWeight:
        """The same codes under other scales, of any dtype of this format."""
        tensors = {"codes": packed.tensors["codes"], "scales": scales}
        return PackedWeight(self.name, packed.shape, scales.dtype, tensors, packed.attributes)

    def codes(self, packed: PackedWeight) -> torch.Tensor:
        """The codes -1, 0, 1 as int8 [N, K]; WeightError for bytes that hold none."""
        from ..kernels import cpu

        with cpu.as_weight_error():
            per_byte = _PER_BYTE[packed.attributes["bits"]]
            codes: torch.Tensor = cpu.ops().ternary_decode(packed.tensors["codes"], per_byte, packed.shape[1])
        return codes

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        n, k = packed.shape
        scales = packed.tensors["scales"]
        group_size = packed.attributes["group_size"]
        if group_size:
            scales = scales.repeat_interleave(group_size, dim=1)[:, :k]
        # + 0.0: a code of -1 under a scale of zero is not -0.0
        return (self.codes(packed).to(packed.dtype) * scales).add_(0.0).view(n, k)

    def lower(self, packed: PackedWeight) -> MachineWeight:
        from ..kernels import cpu

        attributes = packed.attributes
        group_size = attributes["group_size"]
        with cpu.as_weight_error():
            buffer = cpu.ops().lowbit_lower(
                self.codes(packed), _PER_BYTE[attributes["bits"]], group_size, _LIMBS[attributes["activations"]]
            )
        scales = packed.tensors["scales"]
        # [1] or [groups, N]: a kernel reads the scales of neighbouring rows together.
        one = scales.numel() == 1 and not group_size
        machine = scales.view(1).clone() if one else scales.T.clone(memory_format=torch.contiguous_format)
        return MachineWeight(self.name, packed.shape, packed.dtype, {"packed": buffer, "scales": machine})

    def shard(self, packed: PackedWeight, dim: int, index: int, count: int) -> PackedWeight:
        part = self.part(packed.shape[dim], index, count)
        attributes = packed.attributes
        scales = packed.tensors["scales"]
        group_size = attributes["group_size"]
        codes = self.codes(packed)
        if dim == 0:
            codes = codes[part]
            scales = scales if scales.shape[0] == 1 else scales[part]
        else:
            codes = codes[:, part]
            if group_size and part.start % group_size:
                raise WeightError(f"cannot cut columns at {part.start}: scales stand for groups of {group_size}")
            if group_size:
                scales = scales[:, part.start // group_size : -(-part.stop // group_size)]
        options = Options(format="ternary", bits=attributes["bits"], activations=attributes["activations"])
        return self.from_codes(codes.contiguous(), scales.clone(), group_size, options)

    def join(self, parts: Sequence[PackedWeight], empty: Empty = torch.empty) -> PackedWeight | None:
        # One scale for a part is one for each of its rows; all of them may still be one.
        spread = [
            self.rescale(p, p.tensors["scales"].expand(p.shape[0], -1).contiguous())
            if p.tensors["scales"].shape[0] == 1 else p for p in parts
        ]  # fmt: skip
        joined = super().join(spread, empty) if len(parts) > 1 else parts[0]
        return None if joined is None else self.rescale(joined, _shared(joined.tensors["scales"]))

    def validate(self, packed: PackedWeight) -> None:
        super().validate(packed)
        n, k = packed.shape
        bits, group_size = packed.attributes.get("bits"), packed.attributes.get("group_size")
        activations = packed.attributes.get("activations")
        if bits not in _PER_BYTE or group_size not in (0, *GROUP_SIZES["ternary"]) or activations not in _LIMBS:
            raise WeightError(f"ternary: attributes {packed.attributes} are not those of this format")
        codes, scales = packed.tensors["codes"], packed.tensors["scales"]
        expected = (n, -(-k // _PER_BYTE[bits]))
        if tuple(codes.shape) != expected:
            raise WeightError(f"ternary: shape {packed.shape} needs codes {expected}, got {tuple(codes.shape)}")
        allowed = [(n, -(-k // group_size))] if group_size else [(1, 1), (n, 1)]
        if tuple(scales.shape) not in allowed:
            raise WeightError(f"ternary: scales must be one of {allowed}, got {tuple(scales.shape)}")
        if not torch.isfinite(scales).all() or (scales < 0).any():
            raise WeightError("ternary: scales must be finite and not negative")
