"""A sparsity per projection: those that bear pruning better get more of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..prune import ErrorCurve

_HALVINGS = 60


def equal_error(curves: Mapping[str, ErrorCurve], sizes: Mapping[str, int], target: float) -> dict[str, float]:
    """Sparsities with which every module has the same relative error and the mean meets a target.

    Args:
        curves: error over sparsity per module.
        sizes: weights per module.
        target: mean sparsity over all weights, 0 <= target < 1.

    Returns:
        Per module 0 <= s <= 1, between the steps of its curve: rounding to whole weights or blocks is up to
        pruning. Weights that are zero already cost nothing, and go first.
    """
    wanted = target * sum(sizes.values())
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if sum(_sparsity(curve, middle) * sizes[name] for name, curve in curves.items()) < wanted:
            low = middle
        else:
            high = middle
    shares = {name: _sparsity(curve, high) for name, curve in curves.items()}
    # Where zeros alone give more than the target, error 0 prunes too much: take back evenly.
    surplus = sum(shares[name] * sizes[name] for name in curves) / wanted if wanted else 1.0
    return {name: share / surplus for name, share in shares.items()} if high < 1e-12 and surplus > 1 else shares


def _sparsity(curve: ErrorCurve, error: float) -> float:
    """The largest sparsity whose error is at most `error`, linear between steps."""
    i = int(np.searchsorted(curve.error, error, side="right")) - 1
    if i + 1 >= len(curve.error):
        return float(curve.sparsity[-1])
    step = (error - curve.error[i]) / (curve.error[i + 1] - curve.error[i])
    return float(curve.sparsity[i] + step * (curve.sparsity[i + 1] - curve.sparsity[i]))
