"""`block`: blocks of 16x16 weights, of which those that are all zeros are not stored.

For weights pruned in blocks of 16x16, 32x32 or any multiple (block sparsity as in Gray et al., 2017). A
block is stored whole and costs no index per weight; its kernels read activations without looking them up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..errors import WeightError
from ..options import GROUP_SIZES, Options
from ..packed import MachineWeight, PackedWeight
from .base import Candidate, Empty, Format, TensorSpec
from .lanes import ACTIVATION_BITS, check_columns, join_bits, join_halves, lower_lanes, split_halves
from .unstructured import BITS, DEFAULT_GROUP, LEVELS, check_scales, quantise_groups, value_kinds

SIZE = 16
# Strips of 16 rows that are looked at before a whole weight is scanned for blocks of zeros.
_SAMPLED_STRIPS = 8


class Block(Format):
    """Tensors: `blocks` [ceil(N / 16), ceil(ceil(K / 16) / 8)] uint8, and `values`.

    Bit j of byte b of `blocks` says whether block column 8 b + j is stored. `values` is [stored, 16, 16] of the
    weight's dtype or int8, or for int4 [stored, 16, 8] uint8, block row by block row; past N and K it holds
    zeros. Integer values come with `scales` [N, groups] float32. Attributes: `values`, and for integers
    `group_size` (0: one scale per row) and `activations`.
    """

    name = "block"
    dtypes = (torch.bfloat16, torch.float16)
    tensors = (
        TensorSpec("blocks", torch.uint8, 2, "[ceil(N / 16), ceil(ceil(K / 16) / 8)]"),
        TensorSpec("values", None, 3, "[stored, 16, 16]"),
    )

    def specs(self, attributes: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
        values = attributes.get("values")
        if values not in LEVELS:
            return self.tensors
        stored = (
            TensorSpec("values", torch.int8, 3, "[stored, 16, 16]")
            if values == "int8"
            else TensorSpec("values", torch.uint8, 3, "[stored, 16, 8]")
        )
        return (self.tensors[0], stored, TensorSpec("scales", torch.float32, 2, "[N, ceil(K / group_size)]"))

    def candidates(self, weight: torch.Tensor, nnz: int, options: Options) -> list[Candidate]:
        n, k = weight.shape
        asked = options.format == self.name
        if not asked and (nnz > 0.95 * weight.numel() or not _has_zero_blocks(weight)):
            return []
        stored = int(_occupied(weight).sum()) * SIZE * SIZE
        rest = -(-n // SIZE) * -(-k // (8 * SIZE))
        if options.values in LEVELS:
            group = _group_size(options)
            rest += 4 * n * (-(-k // group) if group else 1)
        return [
            Candidate(
                rest + stored * BITS[kind] // 8, partial(self.pack, weight, dataclasses.replace(options, values=kind)),
                kind, stored,
            )
            for kind in value_kinds(weight, options)
        ]  # fmt: skip

    def pack(self, weight: torch.Tensor, options: Options) -> PackedWeight:
        self.check_weight(weight)
        check_columns(self.name, weight.shape[1])
        shape = (weight.shape[0], weight.shape[1])
        if options.values in LEVELS:
            group_size = _group_size(options)
            codes, scales = quantise_groups(weight, LEVELS[options.values], group_size)
            # Stored blocks are those of the weight: all codes of one may be zero.
            occupied = _occupied(weight)
            values = _take(codes, occupied)
            attributes = {
                "values": options.values, "group_size": group_size, "activations": options.activations or "keep"
            }  # fmt: skip
            stored = values if options.values == "int8" else join_halves(values)
            tensors = {"blocks": join_bits(occupied), "values": stored, "scales": scales}
            return PackedWeight(self.name, shape, weight.dtype, tensors, attributes)
        if not torch.isfinite(weight).all():
            raise WeightError("weight has NaN or infinite values")
        occupied = _occupied(weight)
        attributes = {"values": options.values} if options.values in ("bf16", "bf16x12") else {}
        tensors = {"blocks": join_bits(occupied), "values": _take(weight, occupied)}
        return PackedWeight(self.name, shape, weight.dtype, tensors, attributes)

    def nnz(
        self, shape: tuple[int, int], shapes: Mapping[str, tuple[int, ...]], attributes: Mapping[str, Any]
    ) -> int | None:
        # Which blocks reach past N and K no header tells: all count alike.
        blocks = -(-shape[0] // SIZE) * -(-shape[1] // SIZE)
        return round(shapes["values"][0] / blocks * shape[0] * shape[1]) if blocks else 0

    def round(self, weight: torch.Tensor, options: Options) -> torch.Tensor:
        return weight if options.values not in LEVELS else self.pack(weight, options).unpack()

    def _dense(self, packed: PackedWeight, values: torch.Tensor) -> torch.Tensor:
        n, k = packed.shape
        occupied = _split_bits(packed.tensors["blocks"], -(-k // SIZE))
        blocks = values.new_zeros((*occupied.shape, SIZE, SIZE))
        blocks[occupied] = values
        rows, columns = occupied.shape
        return blocks.transpose(1, 2).reshape(rows * SIZE, columns * SIZE)[:n, :k].contiguous()

    def _codes(self, packed: PackedWeight) -> torch.Tensor:
        stored = packed.tensors["values"]
        return stored if packed.attributes["values"] == "int8" else split_halves(stored, SIZE)

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        if packed.attributes.get("values") not in LEVELS:
            return self._dense(packed, packed.tensors["values"])
        scales = packed.tensors["scales"]
        if packed.attributes["group_size"]:
            scales = scales.repeat_interleave(packed.attributes["group_size"], dim=1)[:, : packed.shape[1]]
        return (self._dense(packed, self._codes(packed)).float() * scales).add_(0.0).to(packed.dtype)

    def lower(self, packed: PackedWeight) -> MachineWeight:
        from ..kernels import cpu

        kind = packed.attributes.get("values")
        integer = kind in LEVELS
        dense = self._dense(packed, self._codes(packed) if integer else packed.tensors["values"])
        mask, values = cpu.ops().bitmask_pack(dense.to(torch.bfloat16) if integer else dense)
        if not integer:
            coded = packed.dtype == torch.bfloat16 and kind != "bf16"
            return lower_lanes(self.name, packed.dtype, packed.shape, mask, values, 12 if coded else 16)
        return lower_lanes(
            self.name, packed.dtype, packed.shape, mask, values.to(torch.int8), 8 if kind == "int8" else 4,
            packed.tensors["scales"], packed.attributes["group_size"], packed.attributes["activations"],
        )  # fmt: skip

    def shard(self, packed: PackedWeight, dim: int, index: int, count: int) -> PackedWeight:
        part = self.part(packed.shape[dim], index, count)
        if packed.attributes.get("values") not in LEVELS:
            dense = packed.unpack()
            cut = (dense[part] if dim == 0 else dense[:, part]).contiguous()
            return self.pack(cut, Options(values=packed.attributes.get("values")))
        group_size = packed.attributes["group_size"]
        if dim == 1 and group_size and part.start % group_size:
            raise WeightError(f"cannot cut columns at {part.start}: scales stand for groups of {group_size}")
        if part.start % SIZE:
            raise WeightError(f"cannot cut blocks of {SIZE} at {part.start}; shard before packing")
        codes = self._dense(packed, self._codes(packed))
        occupied = _split_bits(packed.tensors["blocks"], -(-packed.shape[1] // SIZE))
        scales = packed.tensors["scales"]
        blocks = slice(part.start // SIZE, -(-part.stop // SIZE))
        if dim == 0:
            codes, occupied, scales = codes[part], occupied[blocks], scales[part]
        else:
            codes, occupied = codes[:, part], occupied[:, blocks]
            if group_size:
                scales = scales[:, part.start // group_size : -(-part.stop // group_size)]
        values = _take(codes.contiguous(), occupied)
        stored = values if packed.attributes["values"] == "int8" else join_halves(values)
        tensors = {"blocks": join_bits(occupied), "values": stored, "scales": scales.clone()}
        return PackedWeight(
            self.name, (codes.shape[0], codes.shape[1]), packed.dtype, tensors, dict(packed.attributes)
        )  # fmt: skip

    def join(self, parts: Sequence[PackedWeight], empty: Empty = torch.empty) -> PackedWeight | None:
        return None if any(p.shape[0] % SIZE for p in parts[:-1]) else super().join(parts, empty)

    def validate(self, packed: PackedWeight) -> None:
        super().validate(packed)
        n, k = packed.shape
        rows, columns = -(-n // SIZE), -(-k // SIZE)
        blocks, values = packed.tensors["blocks"], packed.tensors["values"]
        kind = packed.attributes.get("values")
        if kind not in (None, "bf16", "bf16x12", *LEVELS):
            raise WeightError(f"block: attributes {packed.attributes} are not those of this format")
        if tuple(blocks.shape) != (rows, -(-columns // 8)):
            raise WeightError(f"block: shape {packed.shape} needs blocks {(rows, -(-columns // 8))}")
        if columns % 8 and rows and bool((blocks[:, -1] >> (columns % 8)).any()):
            raise WeightError(f"block: bits set past block column {columns}")
        stored = int(_split_bits(blocks, columns).sum())
        if tuple(values.shape) != (stored, SIZE, SIZE // 2 if kind == "int4" else SIZE):
            raise WeightError(f"block: {stored} blocks are marked, values are {tuple(values.shape)}")
        if kind in LEVELS:
            group_size = packed.attributes.get("group_size")
            if (
                group_size not in (0, *GROUP_SIZES["block"])
                or packed.attributes.get("activations") not in ACTIVATION_BITS
            ):
                raise WeightError(f"block: attributes {packed.attributes} are not those of this format")
            check_scales(self.name, packed.tensors["scales"], (n, -(-k // group_size) if group_size else 1))


def _group_size(options: Options) -> int:
    return DEFAULT_GROUP[options.values or ""] if options.group_size is None else options.group_size


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    """[ceil(N / 16), ceil(K / 16), 16, 16], zero past N and K."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % SIZE, 0, -n % SIZE))
    return padded.view(-(-n // SIZE), SIZE, -(-k // SIZE), SIZE).transpose(1, 2)


def _occupied(weight: torch.Tensor) -> torch.Tensor:
    """Which blocks hold a nonzero, bool [ceil(N / 16), ceil(K / 16)]."""
    n, k = weight.shape
    rows, columns = -(-n // SIZE), -(-k // SIZE)
    out = torch.empty(rows, columns, dtype=torch.bool)
    step = max(1, (1 << 22) // max(1, SIZE * k))
    for start in range(0, rows, step):  # bounded scratch memory, whatever N is
        part = weight[start * SIZE : (start + step) * SIZE]
        out[start : start + step] = (_blocks(part) != 0).flatten(2).any(dim=2)
    return out


def _take(weight: torch.Tensor, occupied: torch.Tensor) -> torch.Tensor:
    return _blocks(weight)[occupied].contiguous()


def _has_zero_blocks(weight: torch.Tensor) -> bool:
    """Whether any of a few strips of rows has a block of zeros; others are not looked for."""
    if weight.numel() == 0:
        return False
    rows = -(-weight.shape[0] // SIZE)
    for strip in range(0, rows, max(1, rows // _SAMPLED_STRIPS)):
        if not _occupied(weight[strip * SIZE : (strip + 1) * SIZE]).all():
            return True
    return False


def _split_bits(blocks: torch.Tensor, columns: int) -> torch.Tensor:
    bits = (blocks[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.view(blocks.shape[0], 8 * blocks.shape[1])[:, :columns].bool()
