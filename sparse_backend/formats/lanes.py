"""What formats of the lanes kernels share (csrc/lanes/layout.h): dense or blocked weights, a row to a lane."""

from __future__ import annotations

from typing import cast

import torch

from ..errors import WeightError
from ..packed import MachineWeight

# Columns that one strip of 16 rows can number its blocks of 16 by.
MAX_COLUMNS = 65536 * 16
ACTIVATION_BITS = {"keep": 16, "int8": 8}


def full_mask(n: int, k: int) -> torch.Tensor:
    """The mask of a weight that stores every position, [n, ceil(k / 8)] uint8."""
    mask = torch.full((n, (k + 7) // 8), 255, dtype=torch.uint8)
    if k % 8:
        mask[:, -1] = (1 << k % 8) - 1
    return mask


def lower_lanes(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    mask: torch.Tensor,
    values: torch.Tensor,
    bits: int,
    scales: torch.Tensor | None = None,
    group_size: int = 0,
    activations: str = "keep",
) -> MachineWeight:
    """The machine form of stored values; arguments as of the op lanes_lower."""
    from ..kernels import cpu

    check_columns(name, shape[1])
    with cpu.as_weight_error():
        activation_bits = 0 if scales is None else ACTIVATION_BITS[activations]
        buffer = cpu.ops().lanes_lower(mask, values, scales, shape[1], bits, group_size, activation_bits)
    return MachineWeight(name, shape, dtype, {"packed": buffer})


def check_columns(name: str, k: int) -> None:
    """WeightError for more columns than the layout can number."""
    if k > MAX_COLUMNS:
        raise WeightError(f"{name}: holds up to {MAX_COLUMNS} columns, this weight has {k}")


def join_halves(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes -8..7 [..., K] as half bytes [..., ceil(K / 2)] uint8, even columns in the low halves."""
    from ..kernels import cpu

    rows = codes.reshape(codes.shape[:-1].numel(), codes.shape[-1])
    return cast(torch.Tensor, cpu.ops().join_halves(rows)).view(*codes.shape[:-1], -(-codes.shape[-1] // 2))


def split_halves(stored: torch.Tensor, k: int) -> torch.Tensor:
    """What `join_halves` joined, int8 [..., k]; WeightError for another number of bytes."""
    from ..kernels import cpu

    rows = stored.reshape(stored.shape[:-1].numel(), stored.shape[-1])
    with cpu.as_weight_error():
        return cast(torch.Tensor, cpu.ops().split_halves(rows, k)).view(*stored.shape[:-1], k)


def join_bits(occupied: torch.Tensor) -> torch.Tensor:
    """bool [rows, columns] as [rows, ceil(columns / 8)] uint8, bit j of byte b for column 8 b + j."""
    rows, columns = occupied.shape
    padded = torch.nn.functional.pad(occupied.to(torch.uint8), (0, -columns % 8))
    bits = padded.view(rows, -(-columns // 8), 8) << torch.arange(8, dtype=torch.uint8)
    return bits.sum(dim=2, dtype=torch.uint8)
