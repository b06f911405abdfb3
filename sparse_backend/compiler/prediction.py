"""Time and size of a model's projections in each format, as the cost model of this machine predicts them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from .cost import KERNELS, Profile, stored_bytes
from .weight_stats import BLOCKS, MatrixStats

_UNSTRUCTURED = ("bitmask", "sell")
_PRUNED_TO = (0.5, 0.7, 0.9)
_LOSSLESS_VALUES = {"bfloat16": ("bf16", "bf16x12"), "float16": ("fp16",), "float32": ("fp32",)}
_BLOCK = 16
_NO_ZEROS = 0.98


@dataclasses.dataclass(frozen=True)
class Prediction:
    """All projections, each multiplied once, in one format.

    Attributes:
        label: format, values and what is done to the weights, for people.
        lossy: the model computes something else then.
        seconds: predicted time.
        nbytes: size of the canonical forms.
        left_dense: projections without such a kernel; they are counted as they are, dense.
    """

    label: str
    lossy: bool
    seconds: float
    nbytes: int
    left_dense: int


# Of what weights tell: int8 activations are for models trained with them.
_KERNELS = tuple(k for k in KERNELS if not k[1].endswith(" int8"))


@dataclasses.dataclass(frozen=True)
class _Choice:
    """One format of one projection."""

    seconds: float
    nbytes: int


def _lossless(m: MatrixStats, format: str, values: str) -> bool:
    return m.ternary is not None if format == "ternary" else values in _LOSSLESS_VALUES[m.dtype]


def _density(m: MatrixStats, format: str, zeros: float | None) -> float:
    """Share of weights that a format stores, with the zeros there are or that pruning makes."""
    if format in _UNSTRUCTURED:
        return m.density if zeros is None else min(m.density, 1 - zeros)
    if format == "block":
        empty, _ = m.zero_blocks[BLOCKS.index(_BLOCK)]
        return 1 - empty * _BLOCK**2 / m.parameters
    return 1.0


def _worth_showing(matrices: Sequence[MatrixStats], format: str, values: str) -> bool:
    """Not sparse formats of weights without zeros, nor floats that are only wider or narrower than the weights."""
    if format in (*_UNSTRUCTURED, "block"):
        stored = sum(_density(m, format, None) * m.parameters for m in matrices)
        if stored > _NO_ZEROS * sum(m.parameters for m in matrices):
            return False
    return not values.startswith(("bf", "fp")) or any(_lossless(m, format, values) for m in matrices)


def predict(matrices: Sequence[MatrixStats], profile: Profile, batch: int) -> list[Prediction]:
    """One Prediction per kind of kernel, the best mixture without loss, and the best after pruning.

    Pruned rows are for unstructured zeros. Formats that would store rounded ternary weights are predicted like
    any other: what they cost says nothing about what the model is worth then.

    Args:
        matrices: projections; empty ones are left out.
        profile: of the machine.
        batch: rows of activations.
    """

    def choices(m: MatrixStats, kernels: Iterable[tuple[str, str]], zeros: float | None = None) -> list[_Choice]:
        found = []
        for format, values in kernels:
            density = _density(m, format, zeros)
            seconds = profile.seconds(format, values, m.shape, density, batch)
            if seconds is not None:
                found.append(_Choice(seconds, stored_bytes(format, values, m.shape, density)))
        return found

    def together(label: str, lossy: bool, per_matrix: list[list[_Choice]]) -> Prediction:
        best = [min(found or dense[i], key=lambda c: c.seconds) for i, found in enumerate(per_matrix)]
        left_dense = sum(not found for found in per_matrix)
        return Prediction(label, lossy, sum(c.seconds for c in best), sum(c.nbytes for c in best), left_dense)

    matrices = [m for m in matrices if m.parameters]
    if not matrices:
        return []
    dense = [choices(m, [("dense", _LOSSLESS_VALUES[m.dtype][0])]) for m in matrices]
    out = [together("dense, as it is", False, dense)]
    exact = [choices(m, [k for k in _KERNELS if _lossless(m, *k)]) for m in matrices]
    out.append(together("fastest without loss, per projection", False, exact))
    for format, values in _KERNELS:
        if format == "dense" or not _worth_showing(matrices, format, values):
            continue
        lossy = not all(_lossless(m, format, values) for m in matrices)
        label = format if format == values else f"{format}, {values}{' bits' if format == 'ternary' else ''}"
        found = [choices(m, [(format, values)]) for m in matrices]
        if any(found):
            out.append(together(label, lossy, found))
    for zeros in _PRUNED_TO:
        if all(m.density <= 1 - zeros for m in matrices):
            continue
        kernels = [k for k in _KERNELS if k[0] in _UNSTRUCTURED]
        pruned = [choices(m, [k for k in kernels if _lossless(m, *k)], zeros) for m in matrices]
        if any(pruned):
            out.append(together(f"pruned to {zeros:.0%} zeros, fastest sparse", True, pruned))
    return out
