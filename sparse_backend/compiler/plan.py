"""Which format a weight gets, and why.

Today's model is bytes: at batch 1 a kernel runs at the speed of memory, so what is smaller is
faster. The measured cost model, with instructions and batch sizes, comes with `sparse-backend
plan`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..formats import FORMATS, get_format
from ..options import Options
from ..packed import PackedWeight

# A format must save at least this share of the dense bytes to be worth leaving the engine's
# own dense path.
MIN_SAVING = 0.10

# Share of zeros from which work per stored weight (sell) beats work per position (bitmask). Measured
# with benchmarks/kernels.py on Ice Lake, batch 1: at 50% sell takes 1.5x as long, at 75% 0.6x to 0.8x,
# at 90% 0.4x. At batch 8 they meet at 75%.
SELL_FROM_ZEROS = 0.75


def _nnz(weight: torch.Tensor) -> int:
    from ..kernels import cpu

    if weight.dtype in (torch.bfloat16, torch.float16) and weight.is_contiguous():
        return int(cpu.ops().count_nonzero(weight))  # torch's takes as long as all of packing
    return int(torch.count_nonzero(weight))


@dataclasses.dataclass(frozen=True)
class Decision:
    """A format's name (or `dense`), the reason in words, and how to pack (None for dense)."""

    format: str
    reason: str
    pack: Callable[[], PackedWeight] | None = None


def choose(weight: torch.Tensor, options: Options) -> Decision:
    """The format for one weight.

    Args:
        weight: dense [N, K].
        options: of this module; `format` other than auto is obeyed.
    """
    if options.format != "auto":
        reason = f"format {options.format} was asked for"
        if options.format == "dense":
            return Decision("dense", reason)
        return Decision(options.format, reason, lambda: get_format(options.format).pack(weight, options))
    if weight.numel() == 0:
        return Decision("dense", "the weight is empty")
    nnz = _nnz(weight)
    dense_bytes = weight.numel() * weight.dtype.itemsize
    zeros = 1 - nnz / weight.numel()
    found = {f.name: f.lossless(weight, nnz, options) for f in FORMATS.values() if weight.dtype in f.dtypes}
    candidates = {name: candidate for name, candidate in found.items() if candidate is not None}
    if not candidates:
        name = str(weight.dtype).removeprefix("torch.")
        return Decision("dense", f"{name} weights: no lossless format (values bf16 or fp16 would round)")
    if "bitmask" in candidates and "sell" in candidates:  # of the same canonical size
        del candidates["bitmask" if zeros >= SELL_FROM_ZEROS else "sell"]
    best = min(candidates, key=lambda name: candidates[name].nbytes)
    if options.activations == "int8" and "ternary" in candidates:
        # The function it was trained for, and the same one on every rank, whatever its shard's zeros.
        best = "ternary"
    ratio = candidates[best].nbytes / dense_bytes
    if ratio > 1 - MIN_SAVING:
        # Grouped in summaries, so the reason names no number that differs by layer.
        return Decision("dense", "too few zeros for a sparse format to be smaller (prune with --sparsity)")
    return Decision(best, f"{zeros:.0%} zeros: {ratio:.0%} of the dense bytes", candidates[best].pack)
