"""What a checkpoint holds, read from its headers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..formats import get_format
from . import checkpoint, convert

_ITEMSIZE = {"float32": 4}


@dataclasses.dataclass(frozen=True)
class Row:
    """One module, or all modules of a format; `dense_bytes` are the source's."""

    name: str
    format: str
    count: int
    shape: str
    weights: int
    nnz: int | None
    dense_bytes: int
    packed_bytes: int

    @property
    def kind(self) -> str:
        """The last part of the module's name."""
        return self.name.partition(" ")[0].rpartition(".")[2]

    def to_json(self) -> dict[str, Any]:
        """For `inspect --json`."""
        computed = {"zeros": self.zeros, "density": self.density, "bits_per_weight": self.bits_per_weight}
        return {**dataclasses.asdict(self), **computed}

    @property
    def zeros(self) -> float | None:
        """Share of weights that are not stored; None where a header does not tell."""
        if self.nnz is None:
            return None
        return 1 - self.nnz / self.weights if self.weights else 0.0

    @property
    def density(self) -> float | None:
        """Share of weights that are stored."""
        return None if self.zeros is None else 1 - self.zeros

    @property
    def bits_per_weight(self) -> float:
        """Of the canonical form."""
        return 8 * self.packed_bytes / self.weights if self.weights else 0.0


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A checkpoint at a glance.

    Attributes:
        module_count: modules with a 2-D weight, packed or not.
        rows: packed modules.
        dense_rows: projections that are not packed; of their zeros the headers tell nothing.
    """

    architecture: str
    options: dict[str, Any]
    module_count: int
    rows: list[Row]
    dense_rows: list[Row] = dataclasses.field(default_factory=list)

    def by_format(self) -> list[Row]:
        """Rows added up per format."""
        return self._added_up(lambda row: row.format)

    def by_kind(self) -> list[Row]:
        """Rows added up per kind of projection: the last part of the module's name, and format."""
        return self._added_up(lambda row: f"{row.kind} ({row.format})")

    def _added_up(self, group: Callable[[Row], str]) -> list[Row]:
        groups: dict[str, list[Row]] = {}
        for row in [*self.rows, *self.dense_rows]:
            groups.setdefault(group(row), []).append(row)
        return [
            Row(
                name,
                rows[0].format,
                len(rows),
                "",
                sum(r.weights for r in rows),
                None if any(r.nnz is None for r in rows) else sum(r.nnz or 0 for r in rows),
                sum(r.dense_bytes for r in rows),
                sum(r.packed_bytes for r in rows),
            )
            for name, rows in groups.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """For `inspect --json`."""
        return {
            "architecture": self.architecture,
            "options": self.options,
            "modules": [row.to_json() for row in self.rows],
            "dense": [row.to_json() for row in self.dense_rows],
            "kinds": [row.to_json() for row in self.by_kind()],
        }


def inspect(folder: str | Path, verify: bool = False) -> Inspection:
    """Read a checkpoint's headers; with `verify` also every packed tensor.

    Raises:
        CheckpointError: anything is missing or damaged.
    """
    info = checkpoint.read(folder)
    rows = []
    for name, entry in sorted(info.modules.items()):
        packed_bytes = 0
        shapes = {}
        for spec in get_format(entry.format).specs(entry.attributes):
            _, shape = info.tensors[f"{name}.{entry.format}.{spec.name}"]
            size = spec.dtype.itemsize if spec.dtype else _ITEMSIZE.get(entry.dtype, 2)
            packed_bytes += math.prod(shape) * size
            shapes[spec.name] = shape
        nnz = get_format(entry.format).nnz(entry.shape, shapes, entry.attributes)
        weights = entry.shape[0] * entry.shape[1]
        dense_bytes = weights * _source_itemsize(entry, info.config)
        shape_text = f"{entry.shape[0]} x {entry.shape[1]}"
        rows.append(
            Row(f"{name} ({entry.format})", entry.format, 1, shape_text, weights, nnz, dense_bytes, packed_bytes)
        )
    dense_rows = []
    for name in info.module_names():
        if name not in info.modules and convert.is_projection(name):
            dtype, shape = info.tensors[f"{name}.weight"]
            size = math.prod(shape) * checkpoint.bits_of(dtype) // 8
            text = f"{shape[0]} x {shape[1]}"
            dense_rows.append(Row(f"{name} (dense)", "dense", 1, text, math.prod(shape), None, size, size))
    if verify:
        _verify(info)
    architecture = ", ".join(info.config.get("architectures") or ["unknown architecture"])
    options = info.config.get("quantization_config") or {}
    return Inspection(architecture, options, len(info.module_names()), rows, dense_rows)


def _source_itemsize(entry: checkpoint.ModuleEntry, config: dict[str, Any]) -> int:
    """Bytes of one weight of the model that was compiled, which only config.json and what was not converted tell."""
    named = convert.model_dtype(config).itemsize
    if entry.format == "ternary" and (config.get("dtype") or config.get("torch_dtype")):
        return named  # the entry's dtype is that of its scales, which BitNet models may have more exact
    return max(named, _ITEMSIZE.get(entry.dtype, 2))


def _verify(info: checkpoint.Checkpoint) -> None:
    for path in info.files:
        with checkpoint.open_shard(path) as shard:
            here = {m: e for m, e in info.modules.items() if e.file == path}
            names = [
                f"{m}.{e.format}.{spec.name}"
                for m, e in here.items()
                for spec in get_format(e.format).specs(e.attributes)
            ]
            stream = ((name, shard.get_tensor(name)) for name in names)
            try:
                for _ in checkpoint.expand(stream, here):
                    pass
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from None
