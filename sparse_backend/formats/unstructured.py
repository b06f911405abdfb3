"""What formats for unstructured zeros share: one canonical form, several kinds of values.

The canonical form says where weights are (`mask`) and what they are (`values`, row by row). What
differs between `bitmask` and `sell` is the machine form their kernels read.

Kinds of values: the weight's own bf16 or fp16; `bf16x12`, the same bf16 values whose machine form
codes the exponent in 4 bits (lossless); `int8` and `int4`, rounded to the nearest of 255 or 15
equidistant values under one scale per row or group of columns, blind to the zeros (symmetric
round-to-nearest, as LLM.int8(), Dettmers et al., 2022).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch

from ..errors import WeightError
from ..options import Options
from ..packed import MachineWeight, PackedWeight
from .base import Candidate, Empty, Format, TensorSpec
from .lanes import ACTIVATION_BITS, join_halves, split_halves

# Largest code of integer values.
LEVELS = {"int8": 127, "int4": 7}
# Of stored values in the canonical form: bf16x12 is coded as it is lowered.
BITS = {"bf16": 16, "fp16": 16, "bf16x12": 16, "int8": 8, "int4": 4}
DEFAULT_GROUP = {"int8": 0, "int4": 128}


class Unstructured(Format):
    """Tensors: `mask` [N, ceil(K/8)] uint8, bit j of byte b is column 8 b + j; `values`.

    `values` is [nnz] of the weight's dtype or int8, or for int4 [ceil(nnz / 2)] uint8 with value
    2 i in the low half of byte i, two's complement. Integer values come with `scales` [N, groups]
    float32. Attributes: `values`, and for integers `group_size` (0: one scale per row) and
    `activations` (keep, int8).
    """

    dtypes = (torch.bfloat16, torch.float16)
    tensors = (
        TensorSpec("mask", torch.uint8, 2, "[N, ceil(K / 8)]"),
        TensorSpec("values", None, 1, "[nnz]"),
    )
    group_sizes: ClassVar[tuple[int, ...]]
    # Whether bf16 values get coded exponents unless options say otherwise.
    coded: ClassVar[bool]

    @abc.abstractmethod
    def _lower(self, *args: Any) -> torch.Tensor:
        """The format's lowering op."""

    def specs(self, attributes: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
        values = attributes.get("values")
        if values not in LEVELS:
            return self.tensors
        stored = (
            TensorSpec("values", torch.int8, 1, "[nnz]")
            if values == "int8"
            else TensorSpec("values", torch.uint8, 1, "[ceil(nnz / 2)]")
        )
        return (self.tensors[0], stored, TensorSpec("scales", torch.float32, 2, "[N, ceil(K / group_size)]"))

    def candidates(self, weight: torch.Tensor, nnz: int, options: Options) -> list[Candidate]:
        """For values int8 and int4, which round, the candidate that was asked for."""
        return self._candidates(weight, nnz, options, value_kinds(weight, options))

    def _candidates(self, weight: torch.Tensor, nnz: int, options: Options, kinds: tuple[str, ...]) -> list[Candidate]:
        n, k = weight.shape
        scales = 0
        if options.values in LEVELS:
            if options.group_size not in (None, *self.group_sizes):
                return []  # another format has such groups
            group = self._group_size(options)
            scales = 4 * n * (-(-k // group) if group else 1)
        found = []
        for kind in kinds:
            nbytes = n * ((k + 7) // 8) + (nnz * BITS[kind] + 7) // 8 + scales
            chosen = dataclasses.replace(options, values=kind)
            found.append(Candidate(nbytes, partial(self.pack, weight, chosen), kind, nnz))
        return found

    def nnz(
        self, shape: tuple[int, int], shapes: Mapping[str, tuple[int, ...]], attributes: Mapping[str, Any]
    ) -> int | None:
        stored = shapes["values"][0]
        # Of int4 the last byte may hold one value or two.
        return min(2 * stored, shape[0] * shape[1]) if attributes.get("values") == "int4" else stored

    def _group_size(self, options: Options) -> int:
        size = DEFAULT_GROUP[options.values or ""] if options.group_size is None else options.group_size
        if size and size not in self.group_sizes:
            raise WeightError(f"{self.name} has no groups of {size} columns; there are {self.group_sizes}")
        return size

    def pack(self, weight: torch.Tensor, options: Options) -> PackedWeight:
        from ..kernels import cpu

        self.check_weight(weight)
        with cpu.as_weight_error():
            mask, values = cpu.ops().bitmask_pack(weight)
        shape = (weight.shape[0], weight.shape[1])
        if options.values not in LEVELS:
            attributes: dict[str, Any] = {"values": options.values} if options.values in ("bf16", "bf16x12") else {}
            return PackedWeight(self.name, shape, values.dtype, {"mask": mask, "values": values}, attributes)
        group_size = self._group_size(options)
        dense_codes, scales = quantise_groups(weight, LEVELS[options.values], group_size)
        codes = dense_codes[weight != 0]
        attributes = {
            "values": options.values, "group_size": group_size, "activations": options.activations or "keep"
        }  # fmt: skip
        return self._from_codes(mask, codes, scales, weight.dtype, attributes, shape)

    def _from_codes(
        self,
        mask: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        dtype: torch.dtype,
        attributes: dict[str, Any],
        shape: tuple[int, int],
    ) -> PackedWeight:
        stored = codes if attributes["values"] == "int8" else join_halves(codes)
        return PackedWeight(self.name, shape, dtype, {"mask": mask, "values": stored, "scales": scales}, attributes)

    def codes(self, packed: PackedWeight) -> torch.Tensor:
        """Integer values as int8 [nnz]."""
        stored = packed.tensors["values"]
        if packed.attributes["values"] == "int8":
            return stored
        return split_halves(stored, _bits_set(packed.tensors["mask"]))

    def round(self, weight: torch.Tensor, options: Options) -> torch.Tensor:
        return weight if options.values not in LEVELS else self.pack(weight, options).unpack()

    def _dense_codes(self, packed: PackedWeight) -> torch.Tensor:
        from ..kernels import cpu

        with cpu.as_weight_error():
            codes: torch.Tensor = cpu.ops().bitmask_unpack(
                packed.tensors["mask"], self.codes(packed).to(torch.bfloat16), packed.shape[1]
            )
        return codes

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        from ..kernels import cpu

        if packed.attributes.get("values") not in LEVELS:
            with cpu.as_weight_error():
                dense: torch.Tensor = cpu.ops().bitmask_unpack(
                    packed.tensors["mask"], packed.tensors["values"], packed.shape[1]
                )
            return dense
        scales = packed.tensors["scales"]
        if packed.attributes["group_size"]:
            scales = scales.repeat_interleave(packed.attributes["group_size"], dim=1)[:, : packed.shape[1]]
        return (self._dense_codes(packed).float() * scales).add_(0.0).to(packed.dtype)

    def lower(self, packed: PackedWeight) -> MachineWeight:
        from ..kernels import cpu

        values = packed.attributes.get("values")
        mask, k = packed.tensors["mask"], packed.shape[1]
        with cpu.as_weight_error():
            if values in LEVELS:
                buffer = self._lower(
                    mask, self.codes(packed), packed.tensors["scales"], k, BITS[values],
                    packed.attributes["group_size"], ACTIVATION_BITS[packed.attributes["activations"]],
                )  # fmt: skip
            else:
                coded = values == "bf16x12" or (values is None and self.coded)
                bits = 12 if coded and packed.dtype == torch.bfloat16 else 16
                buffer = self._lower(mask, packed.tensors["values"], None, k, bits, 0, 0)
        return MachineWeight(self.name, packed.shape, packed.dtype, {"packed": buffer})

    def shard(self, packed: PackedWeight, dim: int, index: int, count: int) -> PackedWeight:
        part = self.part(packed.shape[dim], index, count)
        mask, attributes = packed.tensors["mask"], dict(packed.attributes)
        integer = attributes.get("values") in LEVELS
        if dim == 1:  # columns are interleaved in `values`: cut the dense form
            if not integer:
                return self._again(packed.unpack()[:, part].contiguous(), attributes)
            group_size = attributes["group_size"]
            if group_size and part.start % group_size:
                raise WeightError(f"cannot cut columns at {part.start}: scales stand for groups of {group_size}")
            # A code may be zero, so the mask is cut as a matrix of its own.
            ones = torch.ones(_bits_set(mask), dtype=torch.bfloat16)
            cut_mask, cut_codes = self._cut(packed, ones, part)
            scales = packed.tensors["scales"]
            if group_size:
                scales = scales[:, part.start // group_size : -(-part.stop // group_size)]
            shape = (packed.shape[0], part.stop - part.start)
            return self._from_codes(cut_mask, cut_codes, scales.clone(), packed.dtype, attributes, shape)
        start, stop = (_bits_set(mask[:n]) for n in (part.start, part.stop))
        shape = (part.stop - part.start, packed.shape[1])
        if integer:
            scales = packed.tensors["scales"][part].clone()
            codes = self.codes(packed)[start:stop].clone()
            return self._from_codes(mask[part].contiguous(), codes, scales, packed.dtype, attributes, shape)
        tensors = {"mask": mask[part].contiguous(), "values": packed.tensors["values"][start:stop].clone()}
        return PackedWeight(self.name, shape, packed.dtype, tensors, attributes)

    def join(self, parts: Sequence[PackedWeight], empty: Empty = torch.empty) -> PackedWeight | None:
        # Two int4 values share a byte: a part that ends within one cannot be followed by another.
        halves = parts[0].attributes.get("values") == "int4"
        if halves and any(_bits_set(p.tensors["mask"]) % 2 for p in parts[:-1]):
            return None
        return super().join(parts, empty)

    def _again(self, weight: torch.Tensor, attributes: Mapping[str, Any]) -> PackedWeight:
        return self.pack(weight, Options(values=attributes.get("values")))

    def _cut(self, packed: PackedWeight, ones: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        from ..kernels import cpu

        where = cpu.ops().bitmask_unpack(packed.tensors["mask"], ones, packed.shape[1])[:, part].contiguous()
        mask, _ = cpu.ops().bitmask_pack(where)
        codes = self._dense_codes(packed)[:, part][where != 0].to(torch.int8)
        return mask, codes

    def validate(self, packed: PackedWeight) -> None:
        super().validate(packed)
        n, k = packed.shape
        mask = packed.tensors["mask"]
        if tuple(mask.shape) != (n, (k + 7) // 8):
            raise WeightError(
                f"{self.name}: shape {packed.shape} needs a mask {(n, (k + 7) // 8)}, got {tuple(mask.shape)}"
            )
        attributes = packed.attributes
        values = attributes.get("values")
        if values not in LEVELS:
            if values not in (None, "bf16", "bf16x12"):
                raise WeightError(f"{self.name}: attributes {attributes} are not those of this format")
            return
        group_size = attributes.get("group_size")
        if group_size not in (0, *self.group_sizes) or attributes.get("activations") not in ACTIVATION_BITS:
            raise WeightError(f"{self.name}: attributes {attributes} are not those of this format")
        expected = (n, -(-k // group_size) if group_size else 1)
        scales = packed.tensors["scales"]
        check_scales(self.name, scales, expected)


def value_kinds(weight: torch.Tensor, options: Options) -> tuple[str, ...]:
    """The kinds of values a plan may choose from; those of bf16 are the same numbers."""
    if options.values in LEVELS:
        return (options.values or "",)
    if weight.dtype == torch.float16:
        return ("fp16",)
    return ("bf16", "bf16x12") if options.values is None else (options.values,)


def check_scales(name: str, scales: torch.Tensor, expected: tuple[int, int]) -> None:
    """WeightError unless scales have the shape and are numbers a code can be multiplied by."""
    if tuple(scales.shape) != expected:
        raise WeightError(f"{name}: scales must be {expected}, got {tuple(scales.shape)}")
    if not torch.isfinite(scales).all() or (scales < 0).any():
        raise WeightError(f"{name}: scales must be finite and not negative")


def quantise_groups(weight: torch.Tensor, levels: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [N, K] and scales [N, groups] float32.

    Args:
        weight: [N, K], any float dtype.
        levels: the largest code; scale = largest magnitude of the row or group / levels.
        group_size: columns per scale; 0 for one per row.

    Raises:
        WeightError: the weight holds NaN or Inf.
    """
    n, k = weight.shape
    group = group_size or max(k, 1)
    groups = -(-k // group) if group_size else 1
    scales = torch.zeros(n, groups, dtype=torch.float32)
    codes = torch.empty(n, k, dtype=torch.int8)
    rows = max(1, (1 << 22) // max(1, k))
    for start in range(0, n if k else 0, rows):  # bounded scratch memory, whatever N is
        block = torch.nn.functional.pad(weight[start : start + rows].float(), (0, groups * group - k))
        parts = block.view(-1, groups, group)
        scale = parts.abs().amax(dim=2) / levels
        if not torch.isfinite(scale).all():
            raise WeightError("weight has NaN or infinite values")
        scales[start : start + rows] = scale
        rounded = (parts / scale.clamp(min=1e-38)[..., None]).round_().clamp_(-levels, levels)
        codes[start : start + rows] = rounded.view(block.shape)[:, :k]
    return codes, scales


def _bits_set(mask: torch.Tensor) -> int:
    return sum(int(((mask >> bit) & 1).sum()) for bit in range(8))
