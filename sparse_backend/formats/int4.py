"""`int4`: dense 4-bit weights with a scale per row or group of columns; lossy, so always asked for.

Symmetric round-to-nearest: w = scale * q, q in -7..7, scale = max|w| / 7 of the group (as group-wise
weight-only quantisation everywhere; GPTQ and AWQ choose better codes for the same storage).
"""

from __future__ import annotations

import torch

from ..errors import WeightError
from ..options import GROUP_SIZES, Options
from ..packed import MachineWeight, PackedWeight
from .base import Candidate, Format, TensorSpec
from .lanes import ACTIVATION_BITS, check_columns, full_mask, join_halves, lower_lanes, split_halves
from .unstructured import check_scales, quantise_groups

DEFAULT_GROUP = 128


class Int4(Format):
    """Tensors: `weight` [N, ceil(K / 2)] uint8, two's complement halves, and `scales` [N, groups] float32.

    Attributes: `group_size` (0: a scale per row), `activations` (keep: 15 bits below the token's largest; int8).
    """

    name = "int4"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    tensors = (
        TensorSpec("weight", torch.uint8, 2, "[N, ceil(K / 2)]"),
        TensorSpec("scales", torch.float32, 2, "[N, ceil(K / group_size)]"),
    )

    def candidates(self, weight: torch.Tensor, nnz: int, options: Options) -> list[Candidate]:
        if options.values != "int4":
            return []
        n, k = weight.shape
        group = _group_size(options)
        nbytes = n * ((k + 1) // 2) + 4 * n * (-(-k // group) if group else 1)
        return [Candidate(nbytes, lambda: self.pack(weight, options), "int4", n * k)]

    def round(self, weight: torch.Tensor, options: Options) -> torch.Tensor:
        return self.pack(weight, options).unpack()

    def pack(self, weight: torch.Tensor, options: Options) -> PackedWeight:
        self.check_weight(weight)
        check_columns(self.name, weight.shape[1])
        group_size = _group_size(options)
        codes, scales = quantise_groups(weight, 7, group_size)
        attributes = {"group_size": group_size, "activations": options.activations or "keep"}
        shape = (weight.shape[0], weight.shape[1])
        return PackedWeight(
            self.name, shape, weight.dtype, {"weight": join_halves(codes), "scales": scales}, attributes
        )  # fmt: skip

    def _codes(self, packed: PackedWeight) -> torch.Tensor:
        return split_halves(packed.tensors["weight"], packed.shape[1])

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        scales = packed.tensors["scales"]
        if packed.attributes["group_size"]:
            scales = scales.repeat_interleave(packed.attributes["group_size"], dim=1)[:, : packed.shape[1]]
        return (self._codes(packed).float() * scales).add_(0.0).to(packed.dtype)

    def lower(self, packed: PackedWeight) -> MachineWeight:
        attributes = packed.attributes
        return lower_lanes(
            self.name, packed.dtype, packed.shape, full_mask(*packed.shape), self._codes(packed).view(-1), 4,
            packed.tensors["scales"], attributes["group_size"], attributes["activations"],
        )  # fmt: skip

    def shard(self, packed: PackedWeight, dim: int, index: int, count: int) -> PackedWeight:
        part = self.part(packed.shape[dim], index, count)
        codes, scales = self._codes(packed), packed.tensors["scales"]
        group_size = packed.attributes["group_size"]
        if dim == 0:
            codes, scales = codes[part], scales[part]
        else:
            if group_size and part.start % group_size:
                raise WeightError(f"cannot cut columns at {part.start}: scales stand for groups of {group_size}")
            codes = codes[:, part]
            if group_size:
                scales = scales[:, part.start // group_size : -(-part.stop // group_size)]
        tensors = {"weight": join_halves(codes.contiguous()), "scales": scales.clone()}
        shape = (codes.shape[0], codes.shape[1])
        return PackedWeight(self.name, shape, packed.dtype, tensors, dict(packed.attributes))

    def validate(self, packed: PackedWeight) -> None:
        super().validate(packed)
        n, k = packed.shape
        group_size, activations = packed.attributes.get("group_size"), packed.attributes.get("activations")
        if group_size not in (0, *GROUP_SIZES["int4"]) or activations not in ACTIVATION_BITS:
            raise WeightError(f"int4: attributes {packed.attributes} are not those of this format")
        groups = -(-k // group_size) if group_size else 1
        if tuple(packed.tensors["weight"].shape) != (n, (k + 1) // 2):
            raise WeightError(f"int4: shape {packed.shape} needs weight {(n, (k + 1) // 2)}")
        check_scales(self.name, packed.tensors["scales"], (n, groups))


def _group_size(options: Options) -> int:
    size = DEFAULT_GROUP if options.group_size is None else options.group_size
    if size and size not in GROUP_SIZES["int4"]:
        raise WeightError(f"int4 has no groups of {size} columns; there are {GROUP_SIZES['int4']}")
    return size
