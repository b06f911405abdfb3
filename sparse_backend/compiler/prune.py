"""Which weights pruning makes zero, from one weight and its scores. Lossy, so always asked for.

Patterns: `unstructured` compares within an output row; `N:M` keeps N of M consecutive columns; `block:BxB` prunes
whole blocks, compared over the weight. A score is |w|, or Wanda's |w| times the norm of its input feature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch

from ..errors import WeightError
from ..options import NM_PATTERNS

_CHUNK = 1 << 24  # weights at a time: bounded scratch memory, whatever N is


def magnitude(weight: torch.Tensor, sparsity: float, pattern: str = "unstructured") -> torch.Tensor:
    """Zero the smallest weights (Han et al., 2015), per output row, group or block.

    Args:
        weight: [N, K], any float dtype.
        sparsity: share to prune, 0 <= s < 1. Zeros already there count towards it. `unstructured`: round(s * K)
            weights of each row go. Blocks: as many as come nearest to s * N * K weights, those with the smallest
            mean score, so that smaller blocks at the edges compete as equals. N:M says its own and does not read it.
        pattern: of options.CHOICES. Under N:M, the last K mod M columns keep ceil(N * (K mod M) / M).

    Returns:
        A new tensor [N, K] of the same dtype. Ties go to the lower column or block, so the result is the same on
        every machine.

    Raises:
        WeightError: the weight holds NaN or Inf.
    """
    return _prune(weight, None, sparsity, pattern)


def wanda(weight: torch.Tensor, norms: torch.Tensor, sparsity: float, pattern: str = "unstructured") -> torch.Tensor:
    """Zero the weights with the smallest |w| * ||x||_2 (Sun et al., 2023: "A Simple and Effective Pruning Approach").

    Args:
        weight: [N, K], any float dtype.
        norms: [K] float32, the L2 norm of each input feature over the calibration tokens.
        sparsity: as for `magnitude`.
        pattern: as for `magnitude`.

    Returns:
        As `magnitude`.

    Raises:
        WeightError: the weight or the norms hold NaN or Inf, or the norms have another length than K.
    """
    if norms.shape != weight.shape[1:]:
        raise WeightError(f"weight has {weight.shape[1]} input features, its calibration {norms.numel()}")
    if not torch.isfinite(norms).all():
        raise WeightError("calibration gave NaN or infinite activations: the model overflows on this text")
    return _prune(weight, norms.float(), sparsity, pattern)


# What needs nothing but the weight, and so works wherever weights pass by.
METHODS: dict[str, Callable[[torch.Tensor, float, str], torch.Tensor]] = {"magnitude": magnitude}


@dataclasses.dataclass(frozen=True)
class ErrorCurve:
    """What pruning a weight further and further costs.

    Attributes:
        sparsity: [D] float64, ascending from 0: shares of the weight that can be pruned.
        error: [D] float64, ascending: the sum of squared scores pruned over the sum of all. With Wanda's scores
            this is the relative error of the layer's output, if its input features were uncorrelated.
    """

    sparsity: np.ndarray
    error: np.ndarray


def error_curve(weight: torch.Tensor, norms: torch.Tensor | None, pattern: str) -> ErrorCurve:
    """The error of pruning [N, K] in the order of its scores, under pattern `unstructured` or blocks.

    Raises:
        WeightError: the weight holds NaN or Inf.
    """
    if pattern.startswith("block:"):
        blocks = _Blocks.of(weight, norms, pattern)
        energy, size = blocks.energy[blocks.order].numpy(), blocks.size[blocks.order].numpy()
    else:
        energy = np.zeros(weight.shape[1])
        for part in _parts(weight, chunk=_CHUNK // 4):
            scores = np.sort(_scores(weight[part], norms).numpy(), axis=1)
            energy += np.sum(np.square(scores, dtype=np.float64), axis=0)
        size = np.full(weight.shape[1], weight.shape[0])
    lost, gone = np.cumsum(energy), np.cumsum(size)
    error = lost / lost[-1] if lost.size and lost[-1] > 0 else np.zeros(lost.size)
    return ErrorCurve(np.concatenate(([0.0], gone / max(1, weight.numel()))), np.concatenate(([0.0], error)))


def _parts(weight: torch.Tensor, multiple: int = 1, chunk: int = _CHUNK) -> Iterator[slice]:
    """Slices of some rows at a time, a multiple of so many."""
    rows = max(1, chunk // max(1, weight.shape[1] * multiple)) * multiple
    for start in range(0, weight.shape[0], rows):
        yield slice(start, min(start + rows, weight.shape[0]))


def _check_finite(part: torch.Tensor) -> None:
    if not torch.isfinite(part).all():
        raise WeightError("weight has NaN or infinite values")


def _scores(part: torch.Tensor, norms: torch.Tensor | None) -> torch.Tensor:
    """Float32 scores of some rows, which must be finite."""
    _check_finite(part)
    scores = part.abs().float()
    return scores if norms is None else scores * norms


def _prune(weight: torch.Tensor, norms: torch.Tensor | None, sparsity: float, pattern: str) -> torch.Tensor:
    drop = round(sparsity * weight.shape[1])
    if weight.numel() == 0 or (pattern == "unstructured" and drop == 0):
        return weight.clone()
    side, gone = 1, torch.empty(0)
    if pattern.startswith("block:"):
        blocks = _Blocks.of(weight, norms, pattern)
        side, gone = blocks.side, blocks.smallest(sparsity)
    pruned = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for part in _parts(weight, side):
        rows = weight[part]
        if pattern.startswith("block:"):
            some = gone[part.start // side : -(-part.stop // side)]
            wide = some.repeat_interleave(side, 0).repeat_interleave(side, 1)
            mask = wide[: rows.shape[0], : rows.shape[1]]
        elif pattern in NM_PATTERNS:
            mask = torch.from_numpy(_smallest_of_groups(_keys(rows, norms), *NM_PATTERNS[pattern]))
        else:
            mask = torch.from_numpy(_smallest(_keys(rows, norms), drop))
        pruned[part] = rows.masked_fill(mask, 0)
    return pruned


def _keys(rows: torch.Tensor, norms: torch.Tensor | None) -> np.ndarray:
    """Integers [rows, K] that order like the scores of each row, equal ones by their column."""
    # Floats that are not negative order like their bit patterns; the column goes into the low bits. bf16 and fp16
    # leave room for it in 32 bits, where numpy's vectorised selection takes less than half of kthvalue's time with 64.
    k = rows.shape[1]
    column = torch.arange(k, dtype=torch.int32)
    if norms is None and rows.element_size() == 2 and k <= 1 << 16:
        _check_finite(rows)
        return (((rows.view(torch.int16).int() & 0x7FFF) << 16) | column).numpy()
    return (_scores(rows, norms).view(torch.int32).long() * k + column).numpy()


def _smallest(keys: np.ndarray, drop: int) -> np.ndarray:
    """Mask of the `drop` smallest keys of each row."""
    if drop == 0:
        return np.zeros(keys.shape, dtype=np.bool_)
    return keys <= np.partition(keys, drop - 1, axis=1)[:, drop - 1 : drop]


def _smallest_of_groups(keys: np.ndarray, n: int, m: int) -> np.ndarray:
    """Mask of all but the N largest of every M columns; the last, short group keeps ceil(N * rest / M)."""
    rows, k = keys.shape
    whole = k // m * m
    mask = np.empty(keys.shape, dtype=np.bool_)
    for first, last, size in ((0, whole, m), (whole, k, k - whole)):
        if first < last:
            groups = keys[:, first:last].reshape(-1, size)
            mask[:, first:last] = _smallest(groups, size - -(-n * size // m)).reshape(rows, -1)
    return mask


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Blocks of a weight, flat, row of blocks by row of blocks.

    Attributes:
        side: rows and columns of a block that is not at an edge.
        shape: blocks down and across.
        size: int64, weights per block.
        energy: float64, sum of squared scores per block.
        order: int64, blocks by ascending mean score.
    """

    side: int
    shape: tuple[int, int]
    size: torch.Tensor
    energy: torch.Tensor
    order: torch.Tensor

    @staticmethod
    def of(weight: torch.Tensor, norms: torch.Tensor | None, pattern: str) -> _Blocks:
        """Score the blocks of `block:BxB`."""
        side = int(pattern.rpartition("x")[2])
        down, across = (-(-length // side) for length in weight.shape)
        total, energy = [], []
        for part in _parts(weight, side):
            scores = _scores(weight[part], norms)
            rows = -(-scores.shape[0] // side)
            fill = (0, across * side - scores.shape[1], 0, rows * side - scores.shape[0])
            # In doubles, whose sums of bf16 do not depend on the order a machine adds in.
            grid = torch.nn.functional.pad(scores, fill).view(rows, side, across, side).double()
            total.append(grid.sum((1, 3)).flatten())
            energy.append(grid.square_().sum((1, 3)).flatten())
        heights, widths = (
            torch.tensor([min(side, length - start) for start in range(0, length, side)]) for length in weight.shape
        )
        size = (heights[:, None] * widths).flatten()
        order = torch.argsort(torch.cat(total) / size, stable=True)
        return _Blocks(side, (down, across), size, torch.cat(energy), order)

    def smallest(self, sparsity: float) -> torch.Tensor:
        """Bool [down, across]: the blocks to prune, nearest to a share of the weight."""
        gone = torch.cat((torch.zeros(1), self.size[self.order].cumsum(0)))
        count = int((gone - sparsity * int(self.size.sum())).abs().argmin())
        mask = torch.zeros(self.size.numel(), dtype=torch.bool)
        mask[self.order[:count]] = True
        return mask.view(self.shape)
