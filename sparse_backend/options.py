"""The one options object: CLI flags, config.json, vLLM's hf_overrides all become this."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import OptionError

QUANT_METHOD = "sparse-compiled"

# What each option may be today. The design names more (nm, sell, wanda, ...): a value
# joins its row here in the change that builds it.
CHOICES: dict[str, tuple[Any, ...]] = {
    "format": ("auto", "dense", "bitmask", "sell", "nm", "block", "ternary", "bf16x12", "int8", "int4"),
    "values": (None, "bf16", "fp16", "bf16x12", "int8", "int4"),
    "bits": (None, 2, 1.6),
    "method": ("magnitude", "wanda", "sparsegpt"),
    "pattern": ("unstructured", "2:4", "4:8", "8:16", "6:16", "4:16", "block:16x16", "block:32x32"),
    "allocation": ("uniform", "error"),
    "group_size": (None, 32, 64, 128, 256),
    "activations": (None, "keep", "int8"),
    "lm_head": ("keep", "int8"),
}

# Decided when a checkpoint is compiled; loading it cannot change them any more.
COMPILE_TIME_KEYS = ("values", "bits", "sparsity", "method", "pattern", "allocation", "group_size")

# Patterns that keep N of M consecutive columns, and thereby say the sparsity: (N, M).
NM_PATTERNS = {"2:4": (2, 4), "4:8": (4, 8), "8:16": (8, 16), "6:16": (6, 16), "4:16": (4, 16)}

# Columns that may share a scale, by format; for sparse ones of values int8 and int4.
GROUP_SIZES: dict[str, tuple[int, ...]] = {
    "bitmask": (64, 128, 256), "nm": (64, 128, 256), "sell": (128, 256), "block": (32, 64, 128, 256),
    "int4": (32, 64, 128, 256), "ternary": (32, 64, 128, 256),
}  # fmt: skip

_NOT_IN_RULES = ("rules", "ignore", "lm_head")


def _show(values: Sequence[Any]) -> str:
    return ", ".join("null" if v is None else str(v) for v in values)


def matches(pattern: str, name: str) -> bool:
    """Whether an `ignore` or `match` pattern takes the HF module `name`.

    `re:...` is a regular expression for the whole name, anything else an fnmatch pattern.
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def _check_pattern(key: str, pattern: object) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise OptionError(f"option '{key}': patterns are non-empty strings, got {pattern!r}")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise OptionError(f"option '{key}': {pattern!r} is no regular expression: {error}") from None


@dataclasses.dataclass(frozen=True)
class Options:
    """How projections are stored and run. The defaults change no weight.

    Attributes:
        format: `auto` packs what gets smaller without loss; a name packs everything that way.
        values: of sparse formats: None keeps the weight's own dtype; `bf16` and `fp16` convert; `bf16x12` stores
            bf16 in 12 bits, losslessly; `int8` and `int4` round to a scale per row or group, blind to the zeros.
        bits: storage bits of ternary weights, 2 or 1.6; None lets the plan choose.
        sparsity: share of weights to prune, 0 <= s < 1: of every output row, or with blocks of the whole weight.
            None prunes nothing, but for N:M patterns, which say it themselves.
        method: how pruning ranks weights: `magnitude`; `wanda` and `sparsegpt` calibrate on text, when compiling.
        pattern: which zeros pruning makes: `unstructured`; `2:4`, `4:8`, `8:16`, `6:16`, `4:16` keep N of M
            consecutive columns; `block:16x16`, `block:32x32` prune whole blocks.
        allocation: `uniform` gives every projection its `sparsity`; `error`, when compiling, gives those of one
            sparsity the same relative error, and `sparsity` on average.
        group_size: columns per scale when `format` ternary rounds a weight (None: one per weight), or of values
            int8 (None: one per row) and int4 (None: 128).
        activations: of layers with ternary, int8 or int4 weights. `int8` makes them int8 per token, `keep` computes
            with 22 bits (int8 and int4 values: 16) below the token's largest; None does what the checkpoint was
            trained with (int8 for BitNet, else keep).
        batch: tokens per step to plan for.
        lm_head: `keep` leaves the output head as it is; `int8` rounds it (int8 weights, a scale per row).
        ignore: HF module names left dense; fnmatch patterns or `re:...`.
        rules: `{"match": pattern, key: value, ...}`; the first match overrides options.

    Raises:
        OptionError: naming the key and the allowed values.
    """

    format: str = "auto"
    values: str | None = None
    bits: float | None = None
    sparsity: float | None = None
    method: str = "magnitude"
    pattern: str = "unstructured"
    allocation: str = "uniform"
    group_size: int | None = None
    activations: str | None = None
    batch: int = 1
    lm_head: str = "keep"
    ignore: tuple[str, ...] = ()
    rules: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for key, allowed in CHOICES.items():
            value = getattr(self, key)
            if isinstance(value, (bool, list, dict)) or value not in allowed:
                raise OptionError(f"option '{key}' = {value!r} is not available; allowed: {_show(allowed)}")
            # As listed: 2.0, of a flag or of JSON, is 2, which names kernels.
            object.__setattr__(self, key, allowed[allowed.index(value)])
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise OptionError(f"option 'batch' = {self.batch!r} is not available; allowed: whole numbers from 1 on")
        if self.sparsity is not None:
            if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, (int, float)):
                raise OptionError(f"option 'sparsity' = {self.sparsity!r} is no number; allowed: null or 0 <= s < 1")
            if not 0 <= self.sparsity < 1:
                raise OptionError(f"option 'sparsity' = {self.sparsity} is out of range; allowed: null or 0 <= s < 1")
            if self.sparsity > 0 and self.format == "dense":
                raise OptionError(
                    "options 'sparsity' and 'format' contradict: format dense stores every weight; "
                    "use format auto or bitmask, or drop sparsity"
                )
        self._check_pruning()
        self._check_storage()
        for key in ("ignore", "rules"):
            value = getattr(self, key)
            if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
                raise OptionError(f"option '{key}' must be a list, got {value!r}")
            object.__setattr__(self, key, tuple(value))
        for pattern in self.ignore:
            _check_pattern("ignore", pattern)
        for rule in self.rules:
            self._check_rule(rule)

    def _check_storage(self) -> None:
        if self.bits is not None and self.format not in ("auto", "ternary"):
            raise OptionError("options 'bits' and 'format' contradict: 'bits' is for format ternary or auto")
        if (
            self.group_size is not None
            and self.format not in ("ternary", "int4")
            and self.values not in ("int8", "int4")
        ):
            raise OptionError(
                "options 'group_size' and 'format' contradict: 'group_size' is for formats ternary and int4 and for "
                "values int8 and int4"
            )
        sparse = ("auto", "dense", "bitmask", "sell", "nm", "block")
        if self.values in ("bf16x12", "int8", "int4") and self.format not in sparse:
            raise OptionError(
                f"options 'values' and 'format' contradict: values {self.values} are for formats auto, bitmask, sell, "
                "nm and block"
            )
        sizes = GROUP_SIZES.get(self.format)
        if self.group_size is not None and sizes is not None and self.group_size not in sizes:
            raise OptionError(
                f"options 'group_size' and 'format' contradict: format {self.format} has groups of {_show(sizes)} "
                "columns"
            )
        if self.format == "bf16x12" and self.values == "fp16":
            raise OptionError("options 'values' and 'format' contradict: format bf16x12 stores bf16, not fp16")
        if self.format == "int8" and self.activations == "int8":
            raise OptionError(
                "options 'activations' and 'format' contradict: format int8 keeps activations; use activations keep, "
                "or values int8 with a sparse format"
            )

    def _check_pruning(self) -> None:
        if self.pattern in NM_PATTERNS:
            if self.sparsity not in (None, self.target_sparsity):
                raise OptionError(
                    f"options 'sparsity' and 'pattern' contradict: pattern {self.pattern} prunes "
                    f"{self.target_sparsity}, not {self.sparsity}; drop 'sparsity'"
                )
            if self.format == "dense":
                raise OptionError(
                    f"options 'pattern' and 'format' contradict: format dense stores every weight, pattern "
                    f"{self.pattern} prunes; use format auto, or drop 'pattern'"
                )
            if self.allocation == "error":
                raise OptionError(
                    f"options 'allocation' and 'pattern' contradict: pattern {self.pattern} prunes "
                    f"{self.target_sparsity} everywhere; drop 'allocation', or use pattern unstructured or block:16x16"
                )
        if self.method == "sparsegpt":
            if self.pattern.startswith("block:"):
                raise OptionError(
                    "options 'method' and 'pattern' contradict: sparsegpt makes no blocks; allowed with it: "
                    f"{_show(('unstructured', *NM_PATTERNS))}"
                )
            if self.allocation == "error":
                raise OptionError(
                    "options 'method' and 'allocation' contradict: allocation error is for methods magnitude and wanda"
                )

    @property
    def target_sparsity(self) -> float:
        """The share of weights that pruning makes zero: `sparsity`, or what an N:M pattern implies; 0.0 for none."""
        if self.pattern in NM_PATTERNS:
            n, m = NM_PATTERNS[self.pattern]
            return 1 - n / m
        return self.sparsity or 0.0

    def _check_rule(self, rule: object) -> None:
        if not isinstance(rule, Mapping) or "match" not in rule:
            raise OptionError(f"option 'rules': each rule is an object with a 'match' pattern, got {rule!r}")
        _check_pattern("rules", rule["match"])
        overrides = {k: v for k, v in rule.items() if k != "match"}
        for key in overrides:
            if key in _NOT_IN_RULES:
                raise OptionError(f"option 'rules': '{key}' cannot be set per module")
        _check_keys(overrides, "rules: ")
        try:
            self._override(overrides)
        except OptionError as error:
            raise OptionError(f"option 'rules', match {rule['match']!r}: {error}") from None

    def _override(self, overrides: Mapping[str, Any]) -> Options:
        if overrides.get("format") == "dense":
            # A module left dense is not pruned.
            overrides = {"sparsity": None, "pattern": "unstructured", **overrides}
        if overrides.get("pattern") in NM_PATTERNS:
            overrides = {"sparsity": None, "allocation": "uniform", **overrides}  # of the modules around it
        if overrides.get("format") in ("ternary", "int8", "int4", "bf16x12"):
            overrides = {"values": None, **overrides}  # of the sparse modules around it
        if overrides.get("format") == "int8":
            overrides = {"activations": None, **overrides}  # of the ternary modules around it
        if overrides.get("format", "ternary") != "ternary":
            overrides = {"bits": None, **overrides}  # of the ternary modules around it
            if overrides["format"] != "int4" and (overrides.get("values", self.values)) not in ("int8", "int4"):
                overrides = {"group_size": None, **overrides}
        return dataclasses.replace(self, **{**overrides, "rules": (), "ignore": ()})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Options:
        """Options from a JSON object; `quant_method` may be among the keys.

        Raises:
            OptionError: for an unknown key, with the nearest known one.
        """
        values = {k: v for k, v in values.items() if k != "quant_method"}
        _check_keys(values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object for config.json: `quant_method` and what differs from the default."""
        out: dict[str, Any] = {"quant_method": QUANT_METHOD}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                out[field.name] = (
                    [dict(v) if isinstance(v, Mapping) else v for v in value] if isinstance(value, tuple) else value
                )
        return out

    def for_module(self, name: str) -> Options | None:
        """The options of one HF module, or None if it is ignored."""
        if any(matches(pattern, name) for pattern in self.ignore):
            return None
        for rule in self.rules:
            if matches(rule["match"], name):
                return self._override({k: v for k, v in rule.items() if k != "match"})
        return self._override({})


def _check_keys(values: Mapping[str, Any], where: str = "") -> None:
    known = [field.name for field in dataclasses.fields(Options)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise OptionError(f"unknown option '{where}{key}'{hint} Allowed: {', '.join(known)}")
