"""What became of a model's projections: one object, filled by the CLI and by every engine."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


def human_bytes(count: float) -> str:
    """Bytes in the decimal unit that leaves one to three digits before the point."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


@dataclasses.dataclass(frozen=True)
class Line:
    """One projection."""

    module: str
    format: str
    dense_bytes: int
    packed_bytes: int
    reason: str = ""

    def fields(self) -> tuple[Any, ...]:
        """What `Report.restore` makes the same line of."""
        return dataclasses.astuple(self)


@dataclasses.dataclass
class Report:
    """Projections in the order they came.

    Attributes:
        total_bytes: of all tensors of a compiled checkpoint, projections or not; 0 from an engine.
    """

    lines: list[Line] = dataclasses.field(default_factory=list)
    changed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    total_bytes: int = 0

    def add_packed(self, module: str, format: str, dense_bytes: int, packed_bytes: int) -> None:
        """A projection stored in a sparse format."""
        self.lines.append(Line(module, format, dense_bytes, packed_bytes))

    def add_dense(self, module: str, dense_bytes: int, reason: str) -> None:
        """A projection left dense, and why."""
        self.lines.append(Line(module, "dense", dense_bytes, dense_bytes, reason))

    def note(self, what: str | None) -> None:
        """Count a weight that options changed: in words (`pruned`, `rounded`, ...); None is none."""
        if what is not None:
            self.changed[what] += 1

    def restore(self, lines: Iterable[Iterable[Any]], changed: Mapping[str, int]) -> None:
        """Add projections of an earlier run, by their fields."""
        self.lines.extend(Line(*fields) for fields in lines)
        self.changed.update(changed)

    @property
    def packed_count(self) -> int:
        """Projections that are not dense."""
        return sum(line.format != "dense" for line in self.lines)

    @property
    def dense_bytes(self) -> int:
        """Bytes all projections would take dense."""
        return sum(line.dense_bytes for line in self.lines)

    @property
    def packed_bytes(self) -> int:
        """Bytes all projections take now."""
        return sum(line.packed_bytes for line in self.lines)

    def dense_reasons(self) -> dict[str, int]:
        """How many projections stayed dense for each reason, commonest first."""
        counts = collections.Counter(line.reason for line in self.lines if line.format == "dense")
        return dict(counts.most_common())

    def by_format(self) -> dict[str, tuple[int, int, int]]:
        """Per format: projections, bytes before, bytes after."""
        out: dict[str, tuple[int, int, int]] = {}
        for line in self.lines:
            count, before, after = out.get(line.format, (0, 0, 0))
            out[line.format] = (count + 1, before + line.dense_bytes, after + line.packed_bytes)
        return out

    def summary(self) -> list[str]:
        """The load summary: one line per format, one per reason for what stayed dense."""
        lines = []
        for format, (count, before, after) in self.by_format().items():
            if format != "dense":
                lines.append(f"{format}: {count} projections, {human_bytes(before)} -> {human_bytes(after)}")
        for reason, count in self.dense_reasons().items():
            lines.append(f"dense: {count} projections: {reason}")
        lines.append(f"all projections: {human_bytes(self.dense_bytes)} -> {human_bytes(self.packed_bytes)}")
        return lines
