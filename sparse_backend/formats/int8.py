"""`int8`: dense int8 weights with one scale per output row; lossy, so always asked for.

Symmetric round-to-nearest: w = scale * q, q in -127..127, scale = max|w| / 127 of the row (the
weight half of LLM.int8(), Dettmers et al., 2022). Activations keep 15 bits. Meant for `lm_head`,
which in a ternary model costs more than all other layers together. Where an engine makes a
compiled projection dense to cut it, it is rounded again: its codes stay, its scales may move by
the rounding of the engine's dtype.
"""

from __future__ import annotations

import torch

from ..errors import WeightError
from ..options import Options
from ..packed import MachineWeight, PackedWeight
from .base import Candidate, Format, TensorSpec
from .ternary import MAX_COLUMNS


def _quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not torch.isfinite(weight).all():
        raise WeightError("weight has NaN or infinite values")
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.zeros(weight.shape[0], 1, dtype=torch.float32)
    rows = max(1, (1 << 22) // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):  # bounded scratch memory, whatever N is
        block = weight[start : start + rows].float()
        scale = block.abs().amax(dim=1, keepdim=True) / 127 if block.shape[1] else block.new_zeros(block.shape[0], 1)
        codes[start : start + rows] = (block / scale.clamp(min=1e-38)).round().clamp(-127, 127).to(torch.int8)
        scales[start : start + rows] = scale
    return codes, scales


class Int8(Format):
    """Tensors: `weight` [N, K] int8, `scales` [N, 1] float32."""

    name = "int8"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    tensors = (
        TensorSpec("weight", torch.int8, 2, "[N, K]"),
        TensorSpec("scales", torch.float32, 2, "[N, 1]"),
    )

    def candidates(self, weight: torch.Tensor, nnz: int, options: Options) -> list[Candidate]:
        n, k = weight.shape
        if options.values != "int8" or options.group_size or options.activations == "int8" or k > MAX_COLUMNS:
            return []
        return [Candidate(n * k + 4 * n, lambda: self.pack(weight, options), "int8", n * k)]

    def round(self, weight: torch.Tensor, options: Options) -> torch.Tensor:
        codes, scales = _quantise(weight)
        return (codes * scales).to(weight.dtype)

    def pack(self, weight: torch.Tensor, options: Options) -> PackedWeight:
        self.check_weight(weight)
        codes, scales = _quantise(weight)
        shape = (weight.shape[0], weight.shape[1])
        return PackedWeight(self.name, shape, weight.dtype, {"weight": codes, "scales": scales})

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        return (packed.tensors["weight"] * packed.tensors["scales"]).to(packed.dtype)

    def lower(self, packed: PackedWeight) -> MachineWeight:
        from ..kernels import cpu

        with cpu.as_weight_error():
            buffer = cpu.ops().lowbit_lower(packed.tensors["weight"], 1, 0, 2)
        scales = packed.tensors["scales"].T.clone(memory_format=torch.contiguous_format)
        return MachineWeight(self.name, packed.shape, packed.dtype, {"packed": buffer, "scales": scales})

    def shard(self, packed: PackedWeight, dim: int, index: int, count: int) -> PackedWeight:
        part = self.part(packed.shape[dim], index, count)
        codes, scales = packed.tensors["weight"], packed.tensors["scales"]
        tensors = {
            "weight": (codes[part] if dim == 0 else codes[:, part]).contiguous(),
            "scales": (scales[part] if dim == 0 else scales).clone(),
        }
        shape = (tensors["weight"].shape[0], tensors["weight"].shape[1])
        return PackedWeight(self.name, shape, packed.dtype, tensors)

    def validate(self, packed: PackedWeight) -> None:
        super().validate(packed)
        n, _ = packed.shape
        if tuple(packed.tensors["weight"].shape) != packed.shape or tuple(packed.tensors["scales"].shape) != (n, 1):
            raise WeightError(f"int8: shape {packed.shape} needs weight {packed.shape} and scales {(n, 1)}")
