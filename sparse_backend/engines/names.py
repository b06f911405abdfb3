"""An engine's module names, the checkpoint's, and which options hold for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..compiler import convert
from ..errors import OptionError
from ..options import Options


@dataclasses.dataclass
class Names:
    """HF module names for an engine's module names.

    Attributes:
        merged: engine's merged projection -> HF parts, by last name part (qkv_proj -> q_proj, ...).
        renamed: engine module name -> HF module name, where they differ.
    """

    merged: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)

    def learn(self, hf_modules: Iterable[str], to_engine: Callable[[str], str | None]) -> None:
        """Fill `renamed` from the checkpoint's modules and the engine's own weight renaming."""
        for name in hf_modules:
            weight = to_engine(f"{name}.weight")
            if weight is not None:
                self.renamed[weight.removesuffix(".weight")] = name

    def hf_parts(self, prefix: str) -> list[str]:
        """HF names of the projections that the engine's module `prefix` holds."""
        parent, _, last = prefix.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in self.merged.get(last, [last])]
        return [self.renamed.get(part, part) for part in parts]

    def parts(self, prefix: str, sizes: Sequence[int]) -> list[tuple[str, int]]:
        """(HF name, output features on this rank) of each part; empty if the engine merges others than it names."""
        names = self.hf_parts(prefix)
        return list(zip(names, sizes, strict=True)) if len(names) == len(sizes) else []


def options_for(options: Options, names: Names, prefix: str) -> tuple[Options | None, str]:
    """The options of one engine module; or None and why it is left alone.

    Raises:
        OptionError: parts that the engine merges have different formats.
    """
    parts = names.hf_parts(prefix)
    for part in parts:
        reason = convert.why_not_projection(part)
        if reason is not None:
            return None, reason
    per_part = [options.for_module(part) for part in parts]
    stored = {None if o is None else _storage(o) for o in per_part}
    if len(stored) > 1:
        listed = ", ".join(f"{n}: {'ignored' if o is None else o.format}" for n, o in zip(parts, per_part, strict=True))
        raise OptionError(
            f"{prefix}: the engine merges {len(parts)} projections that 'rules' or 'ignore' treat differently "
            f"({listed}); give them the same format"
        )
    return per_part[0], convert.IGNORED


def _storage(options: Options) -> tuple[Any, ...]:
    """What parts of one merged layer must agree in."""
    grouped = options.values in ("int8", "int4") or options.format == "int4"
    groups = options.group_size if grouped else None  # ternary parts are rounded before they are merged
    return options.format, options.values, options.bits, options.activations, options.batch, groups
