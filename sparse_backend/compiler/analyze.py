"""`sparse-backend analyze`: what a checkpoint's projections hold, and what that would allow."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from . import checkpoint, convert, weight_stats
from .cost import Profile
from .prediction import Prediction, predict
from .source import Source, why_unknown
from .weight_stats import MatrixStats

Progress = Callable[[int, int, str], None]

KINDS = ("down", "gate", "up", "q", "k", "v", "o", "other")
_LAST_PARTS = {
    **{f"{kind}_proj": kind for kind in KINDS if kind != "other"},
    **{kind: kind for kind in ("q", "k", "v", "o")},
    **{"query": "q", "key": "k", "value": "v", "w1": "gate", "w2": "down", "w3": "up"},
}
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
# Matrices in flight hold up to a Gram matrix of 64 MB each, so more cores help each other with fewer of them.
_MAX_IN_FLIGHT = 4
SIMILAR = 0.9


def kind_of(module: str) -> str:
    """One of KINDS, by the last part of a module's name; merged projections are `other`."""
    return _LAST_PARTS.get(module.rpartition(".")[2], "other")


@dataclasses.dataclass(frozen=True)
class Projection:
    """One matrix: its name in the checkpoint, the first number in that name as its depth, and what it holds."""

    module: str
    kind: str
    layer: int | None
    stats: MatrixStats


@dataclasses.dataclass(frozen=True)
class Similarity:
    """Cosines between matrices of one kind and shape: `cosine` [n, n] float32, estimated (`weight_stats.sketch`)."""

    name: str
    shape: tuple[int, int]
    modules: tuple[str, ...]
    cosine: torch.Tensor

    def pairs(self) -> list[tuple[float, str, str]]:
        """(cosine, module, module), the most alike first, whichever their sign."""
        n = len(self.modules)
        found = [(float(self.cosine[i, j]), self.modules[i], self.modules[j]) for i in range(n) for j in range(i)]
        return sorted(found, key=lambda pair: -abs(pair[0]))


@dataclasses.dataclass(frozen=True)
class KindStats:
    """Projections of one kind together.

    Counts are sums. `kept`, `energy` and `exponent_entropy` are means over matrices weighted by their parameters;
    None where no matrix has one. `distinct` is the largest; None as soon as one has more than MAX_DISTINCT.
    """

    kind: str
    matrices: int
    parameters: int
    nonfinite: int
    zeros: int
    below: tuple[int, ...]
    distinct: int | None
    exponent_bits: int
    exponent_entropy: float | None
    kept: tuple[tuple[float, float] | None, ...]
    zero_blocks: tuple[tuple[int, int], ...]
    nm: tuple[tuple[int, int], ...]
    ternary: collections.Counter[str]
    energy: tuple[float | None, ...] | None
    energy_exact: bool
    octaves: torch.Tensor

    @classmethod
    def of(cls, kind: str, matrices: list[MatrixStats]) -> KindStats:
        """Add matrices (at least one) up."""

        def mean(values: list[float | None]) -> float | None:
            known = [(v, m.parameters) for v, m in zip(values, matrices, strict=True) if v is not None]
            weight = sum(w for _, w in known)
            return sum(v * w for v, w in known) / weight if weight else None

        def counts(values: list[tuple[tuple[int, int], ...]]) -> tuple[tuple[int, int], ...]:
            return tuple((sum(a for a, _ in row), sum(b for _, b in row)) for row in zip(*values, strict=True))

        kept = []
        for column in zip(*(m.kept for m in matrices), strict=True):
            magnitude, squares = (mean([both[part] if both else None for both in column]) for part in (0, 1))
            kept.append(None if magnitude is None or squares is None else (magnitude, squares))
        energies = [m.energy for m in matrices]
        energy = None
        if None not in energies:
            energy = tuple(mean([e[i] for e in energies if e]) for i in range(len(weight_stats.RANKS)))
        distinct = [m.distinct for m in matrices]
        return cls(
            kind=kind,
            matrices=len(matrices),
            parameters=sum(m.parameters for m in matrices),
            nonfinite=sum(m.nonfinite for m in matrices),
            zeros=sum(m.zeros for m in matrices),
            below=tuple(map(sum, zip(*(m.below for m in matrices), strict=True))),
            distinct=None if None in distinct else max(d for d in distinct if d is not None),
            exponent_bits=max(m.exponent_bits for m in matrices),
            exponent_entropy=mean([m.exponent_entropy for m in matrices]),
            kept=tuple(kept),
            zero_blocks=counts([m.zero_blocks for m in matrices]),
            nm=counts([m.nm for m in matrices]),
            ternary=collections.Counter(m.ternary for m in matrices if m.ternary is not None),
            energy=energy,
            energy_exact=all(m.energy_exact for m in matrices),
            octaves=torch.stack([m.octaves for m in matrices]).sum(0),
        )


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What was found in one checkpoint.

    Attributes:
        folder: where it is.
        architecture: as config.json names it.
        projections: in the order of their names.
        left_out: other 2-D weights: how many for each reason.
        similarities: one per kind and shape with at least two matrices.
        predictions: per format, this machine's time and size; empty without a profile.
        machine: what `predictions` were calibrated on.
        warnings: what a reader has to know first.
    """

    folder: Path
    architecture: str
    projections: list[Projection]
    left_out: dict[str, int]
    similarities: list[Similarity]
    predictions: list[Prediction]
    machine: str | None
    warnings: list[str]

    def kinds(self) -> list[KindStats]:
        """In the order of KINDS, as far as they occur."""
        groups = {kind: [p.stats for p in self.projections if p.kind == kind] for kind in KINDS}
        return [KindStats.of(kind, matrices) for kind, matrices in groups.items() if matrices]

    def total(self) -> KindStats:
        """All projections together."""
        return KindStats.of("all", [p.stats for p in self.projections])

    def similar(self) -> list[tuple[float, str, str]]:
        """Pairs of matrices with a cosine of at least SIMILAR or at most -SIMILAR, the most alike first."""
        pairs = [pair for s in self.similarities for pair in s.pairs() if abs(pair[0]) >= SIMILAR]
        return sorted(pairs, key=lambda pair: -abs(pair[0]))


def analyze(
    folder: str | Path,
    progress: Progress | None = None,
    rank: bool = True,
    profile: Profile | None = None,
    batch: int = 1,
) -> Analysis:
    """Read every projection of a checkpoint once.

    Tensors come one at a time from a memory map; as many matrices as there are cores (at most 4) are worked on
    together, in row chunks, so that a model larger than memory is no problem.

    Args:
        folder: checkpoint in HF layout: plain, compiled, or BitNet in any of its forms.
        progress: called as (bytes done, bytes in all, tensor name).
        rank: also compute the energy at rank 32, 128, 512, which takes most of the time.
        profile: of the machine (`calibrate.current_profile()`), for `predictions`; None makes none.
        batch: rows of activations to predict for.

    Raises:
        CheckpointError: the checkpoint cannot be read, or has no linear projection.
    """
    source = Source(checkpoint.read(folder))
    info = source.info
    left_out: collections.Counter[str] = collections.Counter()
    measured: dict[str, tuple[MatrixStats, torch.Tensor]] = {}

    def work(module: str, weight: torch.Tensor) -> None:
        measured[module] = weight_stats.measure(weight, rank), weight_stats.sketch(weight)

    with _workers() as submit:
        for name, tensor in source.weights(finished=_unwanted(info, left_out)):
            module = name.removesuffix(".weight")
            if tensor.dtype not in convert.PRUNABLE_DTYPES:
                left_out[f"{str(tensor.dtype).removeprefix('torch.')} weights"] += 1
            else:
                submit(work, module, tensor)
            if progress is not None:
                progress(source.done_bytes, source.total_bytes, name)
    if not measured:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in left_out.items())
        raise CheckpointError(
            f"{info.folder}: has no linear projection to analyse ({reasons or 'no 2-D <module>.weight tensor'}); "
            "give the original checkpoint, in bfloat16, float16 or float32"
        )
    projections = [_projection(module, measured[module][0]) for module in sorted(measured, key=_natural)]
    return Analysis(
        folder=info.folder,
        architecture=", ".join(info.config.get("architectures") or ["unknown architecture"]),
        projections=projections,
        left_out=dict(left_out.most_common()),
        similarities=_similarities(projections, {module: row[1] for module, row in measured.items()}),
        predictions=[] if profile is None else predict([p.stats for p in projections], profile, batch),
        machine=None if profile is None else profile.machine,
        warnings=_warnings(info, projections),
    )


def _projection(module: str, stats: MatrixStats) -> Projection:
    layer = _LAYER.search(module)
    return Projection(module, kind_of(module), int(layer[1]) if layer else None, stats)


def _natural(module: str) -> list[tuple[int, str]]:
    """layers.10 comes after layers.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in module.split(".")]


def _unwanted(info: checkpoint.Checkpoint, left_out: collections.Counter[str]) -> set[str]:
    """Names of tensors that are no projection's weight; 2-D ones are counted in `left_out`."""
    unwanted = {f"{module}.weight" for module in info.modules if not convert.is_projection(module)}
    for name, (_, shape) in info.tensors.items():
        module = name.removesuffix(".weight")
        if module == name or len(shape) != 2:
            unwanted.add(name)
        elif reason := convert.why_not_projection(module):
            unwanted.add(name)
            left_out[reason] += 1
    return unwanted


@contextlib.contextmanager
def _workers() -> Iterator[Callable[..., None]]:
    """`submit(function, *args)` on all cores; blocks while enough is in flight, raises what a worker raised."""
    cores = torch.get_num_threads()
    count = min(cores, _MAX_IN_FLIGHT)
    waiting: set[concurrent.futures.Future[None]] = set()

    def submit(function: Callable[..., None], *args: Any) -> None:
        nonlocal waiting
        waiting.add(pool.submit(function, *args))
        if len(waiting) >= count + 1:
            done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                future.result()

    # One matrix per thread: an eigenvalue solver alone would leave all cores but one idle.
    threads = max(1, cores // count)
    with concurrent.futures.ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        try:
            yield submit
            for future in waiting:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)


def _similarities(projections: list[Projection], sketches: Mapping[str, torch.Tensor]) -> list[Similarity]:
    groups: dict[tuple[int, str, tuple[int, int]], list[str]] = {}
    for p in projections:
        key = (KINDS.index(p.kind), p.module.rpartition(".")[2], p.stats.shape)
        groups.setdefault(key, []).append(p.module)
    return [
        Similarity(name, shape, tuple(modules), weight_stats.cosines([sketches[m] for m in modules]))
        for (_, name, shape), modules in sorted(groups.items())
        if len(modules) > 1
    ]


def _warnings(info: checkpoint.Checkpoint, projections: list[Projection]) -> list[str]:
    warnings = []
    if unknown := why_unknown(info.config):
        warnings.append(f"{unknown}: projections were found by tensor names and shapes")
    elif all(p.kind == "other" for p in projections):
        warnings.append("no module has a name like q_proj or up_proj: all projections are of kind 'other'")
    bad = [p.module for p in projections if p.stats.nonfinite]
    if bad:
        count = sum(p.stats.nonfinite for p in projections)
        warnings.append(
            f"{count} weight(s) are NaN or infinite, in {len(bad)} module(s), the first {bad[0]}: the checkpoint is "
            "damaged; such weights count as parameters and nowhere else"
        )
    return warnings
