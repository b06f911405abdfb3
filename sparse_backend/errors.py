"""What can go wrong, one class per kind. Every message names the culprit and the remedy."""

from __future__ import annotations


class SparseBackendError(ValueError):
    """Base of every error this package raises on purpose."""


class OptionError(SparseBackendError):
    """An option is unknown, impossible, not built yet, or contradicts another."""


class WeightError(SparseBackendError):
    """A weight cannot be packed: NaN or Inf in it, a wrong dtype or shape."""


class UnfitError(WeightError):
    """A format cannot hold this weight, though a look at some of its rows said so; another one can."""


class CheckpointError(SparseBackendError):
    """A checkpoint cannot be read or written."""


class IsaError(SparseBackendError):
    """A kernel level was asked for that this machine or this build lacks."""
