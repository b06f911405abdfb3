"""Pruning methods: which weights become zero. Lossy, so always asked for."""

from __future__ import annotations

import torch

from ..errors import WeightError


def magnitude(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Zero the smallest weights of every output row (Han et al., 2015, per row).

    Args:
        weight: [N, K], any float dtype.
        sparsity: share of each row to prune, 0 <= s < 1; round(s * K) weights go. Zeros
            already there count towards it.

    Returns:
        A new tensor [N, K] of the same dtype. Ties go to the lower column, so the result is
        the same on every machine.

    Raises:
        WeightError: the weight holds NaN or Inf.
    """
    drop = round(sparsity * weight.shape[1])
    if drop == 0:
        return weight.clone()
    pruned = torch.empty_like(weight, memory_format=torch.contiguous_format)
    rows = max(1, (1 << 24) // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):  # bounded scratch memory, whatever N is
        block = weight[start : start + rows]
        if not torch.isfinite(block).all():
            raise WeightError("weight has NaN or infinite values")
        # bf16 and fp16 magnitudes order like their bit patterns: sort small integers. The
        # column index in the low bits makes every key unique.
        keys = block.abs().float().view(torch.int32).long()
        keys = keys * weight.shape[1] + torch.arange(weight.shape[1])
        threshold = keys.kthvalue(drop, dim=1, keepdim=True).values
        pruned[start : start + rows] = block.masked_fill(keys <= threshold, 0)
    return pruned


METHODS = {"magnitude": magnitude}
