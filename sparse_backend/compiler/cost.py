"""What a multiplication costs: seconds predicted from a weight's shape and zeros, before it is packed.

    seconds = scale * (memory ^ exponent + compute ^ exponent) ^ (1 / exponent)
    memory  = bytes the kernel reads / measured bandwidth
    compute = N * K * seconds per position, which depend on the share of values stored

The coefficients of every kernel, per number of tokens, are measured on the machine (calibrate.py) and kept
in a Profile, a small JSON file.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..errors import OptionError

PROFILE_VERSION = 5

_SPARSE_VALUES = ("bf16", "bf16x12", "fp16", "int8", "int4")
# (format, kind of values) of every kernel that plans choose from; `dense` is the engine's own. Ternary kernels with
# int8 activations do a third of the work of those that keep them.
KERNELS: tuple[tuple[str, str], ...] = (
    ("dense", "bf16"), ("dense", "fp16"), ("dense", "fp32"), ("bf16x12", "bf16x12"), ("int8", "int8"), ("int4", "int4"),
    ("ternary", "2"), ("ternary", "1.6"), ("ternary", "2 int8"), ("ternary", "1.6 int8"),
    *((format, values) for format in ("bitmask", "sell", "block") for values in _SPARSE_VALUES),
)  # fmt: skip

# Formats that run on another's kernels.
SAME_KERNELS = {"nm": "bitmask"}

# Bits of a stored value, in the canonical form and as kernels read it.
_CANONICAL_BITS = {
    "bf16": 16, "fp16": 16, "fp32": 32, "bf16x12": 16, "int8": 8, "int4": 4, "2": 2, "1.6": 1.6,
    "2 int8": 2, "1.6 int8": 1.6,
}  # fmt: skip
# Bytes of scales per position: of int4 a float for 128 columns, the default.
_SCALE_BYTES = {"int4": 4 / 128}
_MACHINE_BITS = {**_CANONICAL_BITS, "bf16x12": 12}
# sell: headers of a block of 64 rows x 128 columns, per position; a column number per value, and half
# a pair of padding for each row of a block.
_SELL_HEADER = (70 + 40) / (64 * 128)
_SELL_PADDING = 0.5 / 128


def stored_bytes(format: str, values: str, shape: tuple[int, int], density: float) -> int:
    """Bytes of the canonical form.

    Args:
        shape: (N, K); density: values stored / (N K), for `block` of whole blocks.
    """
    positions = shape[0] * shape[1]
    bits = 12 if format == "bf16x12" else _CANONICAL_BITS[values]
    scales = positions * _SCALE_BYTES.get(values, 0)
    if format in ("bitmask", "sell", "nm"):
        return math.ceil(positions / 8 + positions * density * bits / 8 + scales)
    if format == "block":
        return math.ceil(positions / 2048 + positions * density * bits / 8 + scales)
    return math.ceil(positions * bits / 8 + scales)


def machine_bytes(format: str, values: str, shape: tuple[int, int], stored: float) -> float:
    """Bytes a kernel reads of a weight [N, K] with so many stored values."""
    positions = shape[0] * shape[1]
    width = _MACHINE_BITS[values] / 8
    scales = positions * _SCALE_BYTES.get(values, 0)
    if format == "bitmask":
        return scales + positions / 8 + stored * width
    if format == "sell":
        return scales + positions * _SELL_HEADER + (stored + positions * _SELL_PADDING) * (width + 1)
    if format == "block":
        return scales + stored * (width + 2 / 256)
    return scales + positions * width


def both(memory: float, compute: float, exponent: float) -> float:
    """Seconds of reading and computing at once; see KernelCost."""
    longer, shorter = max(memory, compute), min(memory, compute)
    return longer * (1 + (shorter / longer) ** exponent) ** (1 / exponent) if longer else 0.0


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """Measured coefficients of one kernel, for the tokens of Profile.batches.

    Attributes:
        densities: values stored / positions of the weights measured, ascending; one if nothing depends on it.
        compute: for each of these, seconds per position of a weight that stays in the cache.
        exponent: how well memory and compute time hide each other: 1 is not at all (their sum), many is perfectly
            (the longer of them); between, they disturb each other most where they are equal.
        scale: for each density, what is left to explain: above 1 where both times together are not enough, below 1
            where a product from memory was faster than the longer of them.
    """

    densities: tuple[float, ...]
    compute: tuple[tuple[float, ...], ...]
    exponent: tuple[float, ...]
    scale: tuple[tuple[float, ...], ...]

    def per_position(self, density: float) -> tuple[float, ...]:
        """Seconds per position at `density`, for the tokens of Profile.batches.

        On a line between measured densities; beyond the outermost, on that of the last two, but never below 0.
        """
        return tuple(max(0.0, seconds) for seconds in self._at(self.compute, density))

    def scale_at(self, density: float) -> tuple[float, ...]:
        """`scale` between measured densities; beyond the outermost, that of the outermost."""
        return self._at(self.scale, min(max(density, self.densities[0]), self.densities[-1]))

    def _at(self, rows: tuple[tuple[float, ...], ...], density: float) -> tuple[float, ...]:
        if len(self.densities) == 1:
            return rows[0]
        i = max(1, min(bisect.bisect_left(self.densities, density), len(self.densities) - 1))
        low, high = self.densities[i - 1], self.densities[i]
        part = (density - low) / (high - low)
        return tuple(a + (b - a) * part for a, b in zip(rows[i - 1], rows[i], strict=True))

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> KernelCost:
        """Raises: KeyError, TypeError, ValueError: it is none."""
        densities, exponent = (tuple(map(float, data[key])) for key in ("densities", "exponent"))
        compute, scale = (tuple(tuple(map(float, row)) for row in data[key]) for key in ("compute", "scale"))
        in_order = list(densities) == sorted(set(densities))
        if not densities or not in_order or not len(compute) == len(scale) == len(densities):
            raise ValueError("its densities do not ascend, or lack measurements")
        return cls(densities, compute, exponent, scale)


@dataclasses.dataclass(frozen=True)
class Profile:
    """One machine, as the cost model sees it.

    Attributes:
        machine: the processor's name and kernel level, for people.
        fingerprint: of processor, kernels, torch and threads; what a cached profile is found by.
        threads: torch threads it was measured with.
        bandwidth: bytes per second all threads read together.
        overhead: seconds a call takes however small.
        batches: numbers of tokens that were measured, ascending.
        kernels: by "format/values".
    """

    # What prompts are judged by: the most tokens that are measured.
    prompt_tokens: ClassVar[int] = 64

    machine: str
    fingerprint: str
    threads: int
    bandwidth: float
    overhead: float
    batches: tuple[int, ...]
    kernels: Mapping[str, KernelCost]

    def seconds(self, format: str, values: str, shape: tuple[int, int], density: float, batch: int) -> float | None:
        """Predicted seconds of one product; None if there is no such kernel.

        Args:
            format, values: a member of KERNELS.
            shape: (N, K) of the weight.
            density: values stored / (N K); for `block`, of whole blocks.
            batch: tokens.
        """
        format = SAME_KERNELS.get(format, format)
        cost = self.kernels.get(f"{format}/{values}")
        if cost is None:
            return None
        positions = shape[0] * shape[1]
        stored = positions * density
        compute = self._at(cost.per_position(density), batch) * positions
        memory = machine_bytes(format, values, shape, stored) / self.bandwidth
        together = both(memory, compute, self._between(cost.exponent, batch))
        return self.overhead + self._between(cost.scale_at(density), batch) * together

    def _at(self, points: Sequence[float], batch: int) -> float:
        """Between measured batches on a line; beyond the last in proportion to it."""
        if batch >= self.batches[-1]:
            return points[-1] * batch / self.batches[-1]
        return self._between(points, batch)

    def _between(self, points: Sequence[float], batch: int) -> float:
        """Between measured batches on a line; beyond the last as there."""
        batch = min(batch, self.batches[-1])
        i = max(1, bisect.bisect_left(self.batches, batch))
        low, high = self.batches[i - 1], self.batches[i]
        return points[i - 1] + (points[i] - points[i - 1]) * (batch - low) / (high - low)

    def to_json(self) -> dict[str, Any]:
        """What `save` writes."""
        return {"version": PROFILE_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile file.

        Raises:
            OptionError: it is missing, damaged or of another version.
        """
        try:
            data = json.loads(path.read_text())
            if data.pop("version") != PROFILE_VERSION:
                raise ValueError("it is of another version")
            kernels = {name: KernelCost.of_json(k) for name, k in data.pop("kernels").items()}
            profile = cls(**{**data, "batches": tuple(data["batches"]), "kernels": kernels})
            counts = {len(points) for k in kernels.values() for points in (*k.compute, k.exponent, *k.scale)}
            if (
                len(profile.batches) < 2
                or counts != {len(profile.batches)}
                or "dense/bf16" not in kernels
                or not profile.bandwidth > 0
            ):
                raise ValueError("it lacks measurements")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OptionError(
                f"{path}: is no machine profile ({error}); make one with 'sparse-backend calibrate --out FILE'"
            ) from None
        return profile
