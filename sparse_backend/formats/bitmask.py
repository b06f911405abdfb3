"""`bitmask`: one bit per weight says whether it is stored; stored weights follow row by row.

Lossless for any zero pattern. Size: N * ceil(K / 8) + 2 * nnz bytes, so it pays from about
one zero in sixteen. The bitmap-plus-values layout is that of SpInfer (Fan et al., EuroSys
2025) and SparAMX (AbouElhamayed et al., 2025); the machine form is our own, see
csrc/bitmask/layout.h.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import WeightError
from ..options import Options
from ..packed import MachineWeight, PackedWeight
from .base import Candidate, Format, TensorSpec


class Bitmask(Format):
    """Tensors: `mask` [N, ceil(K/8)] uint8, bit j of byte b is column 8 b + j; `values` [nnz]."""

    name = "bitmask"
    dtypes = (torch.bfloat16, torch.float16)
    tensors = (
        TensorSpec("mask", torch.uint8, 2, "[N, ceil(K / 8)]"),
        TensorSpec("values", None, 1, "[nnz]"),
    )

    def lossless(self, weight: torch.Tensor, nnz: int, options: Options) -> Candidate | None:
        nbytes = weight.shape[0] * ((weight.shape[1] + 7) // 8) + nnz * weight.dtype.itemsize
        return Candidate(nbytes, lambda: self._pack(weight))

    def nnz(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        return shapes["values"][0]

    def pack(self, weight: torch.Tensor, options: Options) -> PackedWeight:
        return self._pack(weight)

    def _pack(self, weight: torch.Tensor) -> PackedWeight:
        from ..kernels import cpu

        self.check_weight(weight)
        with cpu.as_weight_error():
            mask, values = cpu.ops().bitmask_pack(weight)
        return self._packed((weight.shape[0], weight.shape[1]), mask, values)

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        from ..kernels import cpu

        with cpu.as_weight_error():
            dense: torch.Tensor = cpu.ops().bitmask_unpack(
                packed.tensors["mask"], packed.tensors["values"], packed.shape[1]
            )
        return dense

    def lower(self, packed: PackedWeight) -> MachineWeight:
        from ..kernels import cpu

        with cpu.as_weight_error():
            buffer = cpu.ops().bitmask_lower(packed.tensors["mask"], packed.tensors["values"], packed.shape[1])
        return MachineWeight(self.name, packed.shape, packed.dtype, {"packed": buffer})

    def shard(self, packed: PackedWeight, dim: int, index: int, count: int) -> PackedWeight:
        part = self.part(packed.shape[dim], index, count)
        if dim == 1:  # columns are interleaved in `values`: cut the dense form
            return self._pack(packed.unpack()[:, part].contiguous())
        mask = packed.tensors["mask"]
        start, stop = (_bits_set(mask[:n]) for n in (part.start, part.stop))
        shape = (part.stop - part.start, packed.shape[1])
        return self._packed(shape, mask[part].contiguous(), packed.tensors["values"][start:stop].clone())

    def validate(self, packed: PackedWeight) -> None:
        super().validate(packed)
        n, k = packed.shape
        mask = packed.tensors["mask"]
        if tuple(mask.shape) != (n, (k + 7) // 8):
            raise WeightError(
                f"bitmask: shape {packed.shape} needs a mask {(n, (k + 7) // 8)}, got {tuple(mask.shape)}"
            )

    def _packed(self, shape: tuple[int, int], mask: torch.Tensor, values: torch.Tensor) -> PackedWeight:
        return PackedWeight(self.name, shape, values.dtype, {"mask": mask, "values": values})


def _bits_set(mask: torch.Tensor) -> int:
    return sum(int(((mask >> bit) & 1).sum()) for bit in range(8))
