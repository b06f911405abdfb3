"""A plan for a whole checkpoint: every projection's formats with their predicted times, nothing packed."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from ..api import convert_values
from ..errors import WeightError
from ..options import Options
from . import checkpoint, convert, plan
from .cost import Profile
from .plan import Decision, Prediction
from .source import Progress, Source, why_unknown
from .work import Say

_log: Say = logging.getLogger(__name__).warning


@dataclasses.dataclass(frozen=True)
class Planned:
    """One projection and what is best for it.

    Attributes:
        module: its HF name.
        shape: (N, K).
        reason: of the decision.
        predictions: all of them, fastest first; they hold no weight any more.
        choice: which of them the plan takes.
    """

    module: str
    shape: tuple[int, int]
    reason: str
    predictions: tuple[Prediction, ...]
    choice: int

    @classmethod
    def of(cls, module: str, shape: tuple[int, int], decision: Decision) -> Planned:
        """From a decision, whose predictions can pack and so hold the weight."""
        found = decision.predictions
        chosen = decision.chosen or next(p for p in found if p.format == "dense")
        light = tuple(dataclasses.replace(p, pack=None) for p in found)
        return cls(module, shape, decision.reason, light, found.index(chosen))

    @property
    def dense(self) -> Prediction:
        """The engine's own product."""
        return next(p for p in self.predictions if p.format == "dense")

    @property
    def chosen(self) -> Prediction:
        """What the plan takes."""
        return self.predictions[self.choice]

    @property
    def runner_up(self) -> Prediction | None:
        """The fastest of the others; None where there is nothing else."""
        return next((p for i, p in enumerate(self.predictions) if i != self.choice), None)


def plan_weights(
    folder: str | Path,
    options: Options,
    profile: Profile,
    progress: Progress | None = None,
    say: Say = _log,
) -> list[Planned]:
    """Plan every projection of a checkpoint, reading one weight at a time.

    Pruning is done as `options` say (magnitude only: other methods need the whole model, see `compile --dry-run`).

    Args:
        folder: a checkpoint, plain, compiled or BitNet.
        options: what compiling would be given; `format` other than auto leaves the times of that format and dense.
        profile: of the machine to plan for.
        progress: called as (bytes done, bytes in all, tensor).
        say: told of an unknown architecture.

    Raises:
        CheckpointError, OptionError, WeightError: as compiling would.
    """
    info = checkpoint.read(folder)
    reason = why_unknown(info.config)
    if reason is not None:
        say(f"{info.folder}: unknown architecture ({reason}): planned by tensor names and shapes")
    source = Source(info)
    if source.bitnet is not None and options.activations is None:
        options = dataclasses.replace(options, activations="int8")  # as compiling and engines do
    planned = []
    for name, tensor in source.weights():
        if progress is not None:
            progress(source.done_bytes, source.total_bytes, name)
        module = name.removesuffix(".weight")
        module_options = options.for_module(module)
        if module == name or tensor.dim() != 2 or module_options is None or not convert.is_projection(module):
            continue
        if tensor.dtype not in convert.PRUNABLE_DTYPES or not tensor.numel():
            continue
        weight, _ = convert.change_weight(module, tensor, module_options)
        try:
            weight = convert_values(weight, module_options.values).contiguous()
            decision = plan.choose(weight, module_options, profile, explain=True)
        except WeightError as error:
            raise WeightError(f"{module}: {error}; {convert.FIX}") from None
        planned.append(Planned.of(module, (tensor.shape[0], tensor.shape[1]), decision))
    return planned
