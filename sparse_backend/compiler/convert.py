"""What becomes of one weight: for the CLI and the engines."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..api import convert_values
from ..errors import OptionError, WeightError
from ..formats import get_format
from ..options import Options
from ..packed import PackedWeight
from . import plan, prune

# Modules with a 2-D weight that are no linear projection, or that decide rather than
# project: look-ups, output heads, classifiers, routers. Compared with whole name parts.
_NOT_PROJECTIONS = re.compile(
    r"(^|\.)(embed\w*|\w*embed|\w*embedding(s|_table)?|wte|wpe|shared|lm_head|output_layer|score|classifier|pooler|"
    r"router|gate|shared_expert_gate|relative_attention_bias)(\.|$)|(^|\.)output$"
)
_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")

IGNORED = "in 'ignore'"
FIX = "fix the checkpoint or add the module to 'ignore'"
# Anything else is quantised codes or not a weight.
PRUNABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# As option `values` calls what float32 weights, or the other's, are rounded to.
_VALUES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def why_not_projection(module: str) -> str | None:
    """Why a module's 2-D weight is left alone, or None if it is a linear projection."""
    if _NOT_PROJECTIONS.search(module):
        return "embedding, head or router"
    if _EXPERTS.search(module):
        return "fused experts have no sparse kernel yet"
    return None


def is_projection(module: str) -> bool:
    """Whether a module's 2-D weight is a linear projection."""
    return why_not_projection(module) is None


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype config.json names for the model's weights; bfloat16 if it names none."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    dtype = getattr(torch, name, None)
    return dtype if dtype in PRUNABLE_DTYPES else torch.bfloat16


def prune_alone(module: str, weight: torch.Tensor, options: Options) -> torch.Tensor:
    """Prune a weight of which nothing else is known, as it passes by.

    Raises:
        OptionError: its options need more: calibration, or the other weights.
    """
    for key, value, done in (
        ("method", options.method, options.method in prune.METHODS),
        ("allocation", options.allocation, options.allocation == "uniform"),
    ):
        if not done:
            raise OptionError(
                f"{module}: option '{key}' = {value!r} needs the whole model, not one weight at a time while loading; "
                "compile it first: sparse-backend compile MODEL OUT"
            )
    return prune.METHODS[options.method](weight, options.target_sparsity, options.pattern)


def change_weight(
    module: str,
    weight: torch.Tensor,
    options: Options,
    pruned: Callable[[str, torch.Tensor, Options], torch.Tensor] = prune_alone,
) -> tuple[torch.Tensor, str | None]:
    """The weight of one HF module as its options ask for, and what that was: `pruned`, `rounded`, both or None.

    What depends on the whole weight happens here, before an engine shards it. `pruned` prunes it.

    Raises:
        WeightError: naming the module.
        OptionError: it cannot be pruned so.
    """
    done = []
    try:
        if options.target_sparsity:
            weight = pruned(module, weight, options)
            done.append("pruned")
        rounded = weight
        if options.format == "ternary":
            rounded = get_format("ternary").round(weight, options)
        if rounded is not weight or (options.values in ("int8", "int4") and options.format != "dense"):  # as it packs
            done.append("rounded")
    except WeightError as error:
        raise WeightError(f"{module}: {error}; {FIX}") from None
    return rounded, " and ".join(done) or None


def what_changed(weight: torch.Tensor, packed: PackedWeight, what: str | None) -> str | None:
    """What change_weight said of a weight (`what`), and what packing it then rounded."""
    if what is not None and "rounded" in what:
        return what
    if packed.format in ("int8", "int4"):
        rounded = "rounded"
    elif torch.equal(weight.to(packed.dtype).to(weight.dtype), weight):
        return what
    else:
        rounded = f"rounded to {_VALUES[packed.dtype]}"
    return rounded if what is None else f"{what} and {rounded}"


def pack_weight(
    module: str, weight: torch.Tensor, options: Options, device: torch.device | None = None
) -> tuple[PackedWeight | None, str]:
    """Pack one weight as its options say: (packed or None for dense, reason). `device` as of plan.pack.

    Raises:
        WeightError: naming the module.
    """
    try:
        weight = convert_values(weight, options.values)
        return plan.pack(weight, options, device)
    except WeightError as error:
        raise WeightError(f"{module}: {error}; {FIX}") from None
