"""Which format a weight gets, and why: the one predicted fastest on this machine.

Every format says how it could hold the weight (Format.candidates); the cost model (cost.py; for GPUs gpu_cost.py) says
what a step of `batch` tokens takes with each, and with the engine's own dense product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import cast

import torch

from ..errors import UnfitError, WeightError
from ..formats import FORMATS, get_format
from ..formats.unstructured import LEVELS, Unstructured, value_kinds
from ..kernels import registry
from ..options import Options
from ..packed import PackedWeight
from .calibrate import current_profile
from .cost import Profile
from .gpu_cost import GpuProfile, gpu_profile

# Predictions within this share of each other are one: the smaller format is taken, and dense is left
# only for more.
TIE = 0.03

# Prompts are processed in large batches, where a machine with matrix units multiplies dense weights much faster
# than kernels without: a format this many times slower than dense at a profile's `prompt_tokens` is not taken.
PREFILL_LIMIT = 4.0

# Formats of one canonical form: a weight in one is a weight in the other.
ONE_FORM = ("bitmask", "sell")

_CPU = torch.device("cpu")

AnyProfile = Profile | GpuProfile
_DENSE_VALUES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One way to store a weight.

    Attributes:
        format, values: of the kernel (cost.KERNELS).
        seconds: of one step, as predicted.
        nbytes: of the canonical form.
        pack: makes it; None for dense.
    """

    format: str
    values: str
    seconds: float
    nbytes: int
    pack: Callable[[], PackedWeight] | None = None

    @property
    def name(self) -> str:
        """For people."""
        return (
            self.format
            if self.values in (self.format, "") or self.format == "dense"
            else f"{self.format} {self.values}"
        )


@dataclasses.dataclass(frozen=True)
class Decision:
    """What became of one weight.

    Attributes:
        format: its name, or `dense`.
        reason: in words.
        pack: makes the packed weight; None for dense.
        predictions: all that was considered, fastest first; empty where options left no choice.
    """

    format: str
    reason: str
    pack: Callable[[], PackedWeight] | None = None
    predictions: tuple[Prediction, ...] = ()

    @property
    def chosen(self) -> Prediction | None:
        """The prediction of what was taken."""
        return next((p for p in self.predictions if p.pack is self.pack and p.format == self.format), None)


def _nnz(weight: torch.Tensor) -> int:
    from ..kernels import cpu

    if weight.dtype in (torch.bfloat16, torch.float16) and weight.is_contiguous():
        return int(cpu.ops().count_nonzero(weight))  # torch's takes as long as all of packing
    return int(torch.count_nonzero(weight))


def predictions(
    weight: torch.Tensor, nnz: int, options: Options, profile: AnyProfile, formats: tuple[str, ...] = tuple(FORMATS)
) -> list[Prediction]:
    """All ways to store a weight that `options` allow, dense among them, fastest first."""
    shape = (weight.shape[0], weight.shape[1])
    dense = profile.seconds("dense", _DENSE_VALUES.get(weight.dtype, "fp32"), shape, 1.0, options.batch)
    found = [Prediction("dense", "", dense or float("inf"), weight.numel() * weight.dtype.itemsize)]
    for name in formats:
        form = FORMATS[name]
        if weight.dtype not in form.dtypes:
            continue
        for c in form.candidates(weight, nnz, options):
            seconds = profile.seconds(name, c.values, shape, c.stored / weight.numel(), options.batch)
            if seconds is not None:
                found.append(Prediction(name, c.values, seconds, c.nbytes, c.pack))
    return sorted(found, key=lambda p: p.seconds)


def profile_of(device: torch.device) -> AnyProfile:
    """What plans for kernels on a device go by: a CPU is measured once, a GPU's figures follow from its properties."""
    return gpu_profile(device) if device.type == "cuda" else current_profile()


def fit_for_prompts(
    found: Collection[Prediction], weight: torch.Tensor, nnz: int, profile: AnyProfile
) -> list[Prediction]:
    """Of `predictions`, dense and those that are not far slower than it where prompts are processed."""
    shape = (weight.shape[0], weight.shape[1])
    dense = next(p for p in found if p.format == "dense")
    limit = PREFILL_LIMIT * _at_prefill(profile, dense, weight, nnz, shape)
    return [p for p in found if p is dense or _at_prefill(profile, p, weight, nnz, shape) <= limit]


def pack(weight: torch.Tensor, options: Options, device: torch.device | None = None) -> tuple[PackedWeight | None, str]:
    """Pack one weight as `choose` says: (packed or None for dense, reason).

    A format that looked as if it could hold the weight and cannot, or that the device's kernels refuse, is left out,
    and the next one taken.

    Args:
        weight: dense [N, K], wherever it lies.
        options: as of `choose`.
        device: whose kernels will run it; None for where it lies.

    Raises:
        WeightError: NaN or Inf, or a format that was asked for cannot hold it.
    """
    device = device or weight.device
    weight = weight.cpu()
    profile = profile_of(device) if options.format == "auto" and weight.numel() else None
    unfit: set[str] = set()
    refused = None
    while True:
        decision = choose(weight, options, profile, without=unfit)
        if decision.pack is None:
            if refused is None:
                return None, decision.reason
            left = any(p.format != "dense" for p in decision.predictions)
            return None, f"{decision.reason}; of others: {refused}" if left else refused
        try:
            packed = decision.pack()
            refusal = registry.refusal(packed, device.type) if options.format == "auto" else None
            if refusal is None:
                return packed, decision.reason
            refused = refusal
        except UnfitError:
            if options.format != "auto":
                raise
        unfit.add(decision.format)


def choose(
    weight: torch.Tensor,
    options: Options,
    profile: AnyProfile | None = None,
    explain: bool = False,
    without: Collection[str] = (),
) -> Decision:
    """The format for one weight.

    Args:
        weight: dense [N, K], contiguous, on the CPU.
        options: of this module; `format` other than auto is obeyed.
        profile: of the machine to plan for; None for this one's CPU.
        explain: predict also where a named format leaves no choice.
        without: formats that `auto` leaves out.

    Raises:
        WeightError: `explain`, and the format that was asked for cannot hold the weight.
    """
    if options.format != "auto":
        return _asked_for(weight, options, profile if explain else None)
    if weight.numel() == 0:
        return Decision("dense", "the weight is empty")
    profile = profile or current_profile()
    nnz = _nnz(weight)
    found = predictions(weight, nnz, options, profile, tuple(name for name in FORMATS if name not in without))
    dense = next(p for p in found if p.format == "dense")
    if len(found) == 1:
        name = str(weight.dtype).removeprefix("torch.")
        reason = f"no lossless format for {name} weights (values bf16 or fp16 would round)"
        return Decision("dense", reason, None, tuple(found))
    if options.activations == "int8" and any(p.format == "ternary" for p in found):
        # The function it was trained for, and the same one on every rank, whatever its shard's zeros.
        allowed = [p for p in found if p.format == "ternary"]
    else:
        allowed = fit_for_prompts(found, weight, nnz, profile)
    # Without what every call costs, or small weights would all be ties.
    net = {id(p): p.seconds - profile.overhead for p in allowed}
    fastest = min(net.values())
    best = min((p for p in allowed if net[id(p)] <= fastest * (1 + TIE)), key=lambda p: p.nbytes)
    if best.format != "ternary" and best.seconds - profile.overhead > (dense.seconds - profile.overhead) * (1 - TIE):
        best = dense
    if best is dense:
        # Grouped in summaries, so the reason names no number that differs by layer.
        reason = "predicted as fast as any format (pruning with --sparsity changes that)"
        if any(p.seconds - profile.overhead < (dense.seconds - profile.overhead) * (1 - TIE) for p in found):
            reason = "what is faster per token would process prompts far slower"
        return Decision("dense", reason, None, tuple(found))
    gain = f"{dense.seconds / best.seconds:.1f}x dense predicted" if best.seconds else ""
    return Decision(best.format, f"{1 - nnz / weight.numel():.0%} zeros: {gain}", best.pack, tuple(found))


def reconsider(
    packed: PackedWeight, options: Options, profile: AnyProfile | None = None, device: torch.device = _CPU
) -> PackedWeight:
    """A compiled weight under the format that is fastest here, of those that share its canonical form.

    What was compiled on another machine, or for another batch, keeps its tensors: only what they are lowered to
    changes. Asks nothing of the weights themselves.
    """
    if options.format != "auto" or packed.format not in ONE_FORM or not packed.shape[0] * packed.shape[1]:
        return packed
    profile = profile or profile_of(device)
    stored = packed.attributes.get("values")
    integer = stored in LEVELS
    kinds = (str(stored),) if integer else value_kinds(packed.tensors["values"], options)
    values = packed.tensors["values"].numel() * (2 if stored == "int4" else 1)
    density = min(1.0, values / (packed.shape[0] * packed.shape[1]))
    found = []
    for name in ONE_FORM:
        if integer and packed.attributes["group_size"] not in (0, *cast(Unstructured, FORMATS[name]).group_sizes):
            continue
        for kind in kinds:
            seconds = profile.seconds(name, kind, packed.shape, density, options.batch)
            if seconds is not None:
                found.append((seconds, name, kind))
    if not found:
        return packed
    _, name, kind = min(found)
    attributes = {**packed.attributes, **({} if kind == "fp16" else {"values": kind})}
    return PackedWeight(name, packed.shape, packed.dtype, packed.tensors, attributes)


def _asked_for(weight: torch.Tensor, options: Options, profile: AnyProfile | None) -> Decision:
    reason = f"format {options.format} was asked for"
    found: tuple[Prediction, ...] = ()
    best = None
    if profile is not None and weight.numel():
        # int8 and int4 are what `values` of these names are to a dense weight.
        rounds = options.format in ("int8", "int4")
        asked = dataclasses.replace(options, format="auto", values=options.format) if rounds else options
        formats = () if options.format == "dense" else (options.format,)
        found = tuple(predictions(weight, _nnz(weight), asked, profile, formats))
        best = next((p for p in found if p.format == options.format), None)
        if best is None and options.format != "dense":
            raise WeightError(f"format {options.format} cannot hold this weight as it is")
    if options.format == "dense":
        return Decision("dense", reason, None, found)
    packs = best.pack if best is not None else None
    return Decision(options.format, reason, packs or (lambda: get_format(options.format).pack(weight, options)), found)


def _at_prefill(profile: AnyProfile, p: Prediction, weight: torch.Tensor, nnz: int, shape: tuple[int, int]) -> float:
    values = _DENSE_VALUES.get(weight.dtype, "fp32") if p.format == "dense" else p.values
    density = nnz / weight.numel() if p.format in ("bitmask", "sell", "nm", "block") else 1.0
    return profile.seconds(p.format, values, shape, density, profile.prompt_tokens) or float("inf")
