"""An analysis in tables and sentences, for the terminal and the HTML report alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ..report import human_bytes
from . import weight_stats
from .analyze import SIMILAR, Analysis, KindStats

_EMPTY = "-"


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row, the others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def label(kind: str) -> str:
    """A kind as checkpoints call it."""
    return kind if kind in ("other", "all") else f"{kind}_proj"


def percent(part: float | None, digits: int = 1) -> str:
    """A share, or a dash for None."""
    return _EMPTY if part is None else f"{part:.{digits}%}"


def tables(analysis: Analysis) -> list[Table]:
    """Magnitudes, pruning and rank, structure, and the prediction if there is one."""
    kinds = analysis.kinds()
    if len(kinds) > 1:
        kinds.append(analysis.total())
    out = [_magnitudes(kinds), _kept(kinds), _structure(kinds)]
    return [*out, _predicted(analysis)] if analysis.predictions else out


def _magnitudes(kinds: list[KindStats]) -> Table:
    below = (f"<{t}" for t in weight_stats.THRESHOLDS)
    rows = []
    for k in kinds:
        shares = (_share(count, k.parameters) for count in (*k.below, k.zeros))
        rows.append((label(k.kind), str(k.matrices), f"{k.parameters:,}", *shares))
    title = "Magnitudes: share of weights below"
    return Table(title, ("projection", "matrices", "params", *below, "zeros"), rows)


def _kept(kinds: list[KindStats]) -> Table:
    kept = (f"kept, {s:.0%}" for s in weight_stats.PRUNED_SHARES)
    ranks = (f"rank {r}" for r in weight_stats.RANKS)
    rows = []
    for k in kinds:
        magnitudes = (percent(both[0] if both else None) for both in k.kept)
        bound = "" if k.energy_exact else ">"
        energies = (_EMPTY if e is None else f"{bound}{e:.1%}" for e in k.energy or (None,) * len(weight_stats.RANKS))
        rows.append((label(k.kind), *magnitudes, *energies))
    title = "Magnitude kept after pruning this share of each matrix; energy in the largest singular values"
    return Table(title, ("projection", *kept, *ranks), rows)


def _structure(kinds: list[KindStats]) -> Table:
    blocks = (f"{b}x{b}" for b in weight_stats.BLOCKS)
    groups = (f"{n}:{m}" for n, m in weight_stats.NM_PATTERNS)
    rows = []
    for k in kinds:
        distinct = f">{weight_stats.MAX_DISTINCT:,}" if k.distinct is None else f"{k.distinct:,}"
        entropy = _EMPTY if k.exponent_entropy is None else f"{k.exponent_entropy:.2f} of {k.exponent_bits}"
        shares = (_share(*found) for found in (*k.zero_blocks, *k.nm))
        rows.append((label(k.kind), *shares, distinct, f"{k.ternary.total()} of {k.matrices}", entropy))
    title = "Structure: blocks of zeros only, N:M groups that fit, different values, ternary matrices, exponents"
    return Table(title, ("projection", *blocks, *groups, "values", "ternary", "exponent bits"), rows)


def _predicted(analysis: Analysis) -> Table:
    dense = analysis.predictions[0].seconds
    rows = []
    for p in analysis.predictions:
        speed = f"{dense / p.seconds:.2f}x" if p.seconds else _EMPTY
        what = "lossy" if p.lossy else "the same"
        rows.append((p.label, what, f"{1e3 * p.seconds:.2f} ms", speed, human_bytes(p.nbytes), str(p.left_dense)))
    title = f"Predicted: every projection once, on {analysis.machine}"
    return Table(title, ("format", "model", "time", "speed", "size", "left dense"), rows)


def _share(part: int, whole: int) -> str:
    return percent(part / whole if whole else None)


def findings(analysis: Analysis) -> list[str]:
    """What the numbers mean, in plain sentences."""
    total = analysis.total()
    lines = [_ternary(total), _zeros(total), _patterns(total), _pruning(total), _exponents(total), _rank(total)]
    lines += [_sharing(analysis)]
    for reason, count in analysis.left_out.items():
        lines.append(f"left out: {count} x {reason}")
    return [line for line in lines if line]


def _ternary(total: KindStats) -> str:
    if not total.ternary:
        return "ternary: no matrix is ternary; rounding to it would lose nearly everything"
    found = ", ".join(f"{count} with a scale per {how}" for how, count in total.ternary.most_common())
    return f"ternary: {found}, of {total.matrices}; these store in 2 bits per weight without loss"


def _zeros(total: KindStats) -> str:
    share = total.zeros / total.parameters if total.parameters else 0.0
    if share < 0.005:
        return "zeros: hardly any; sparse formats gain nothing before pruning"
    return f"zeros: {share:.1%} of the weights; sparse formats leave them out without loss"


def _patterns(total: KindStats) -> str:
    """N:M and block shares beside what as many zeros give by chance: only more than that is structure."""
    if not total.zeros:
        return ""
    density = 1 - total.zeros / total.parameters
    parts = []
    for (n, m), (fits, groups) in zip(weight_stats.NM_PATTERNS, total.nm, strict=True):
        chance = sum(math.comb(m, i) * density**i * (1 - density) ** (m - i) for i in range(n + 1))
        if groups:
            parts.append(f"{n}:{m} fits {fits / groups:.1%} of groups ({chance:.1%} by chance)")
    for size, (empty, blocks) in zip(weight_stats.BLOCKS, total.zero_blocks, strict=True):
        if blocks and empty:
            chance = (1 - density) ** (size * size)
            parts.append(f"{size}x{size} blocks: {empty / blocks:.1%} empty ({chance:.1%} by chance)")
    return f"patterns: {'; '.join(parts)}" if parts else ""


def _pruning(total: KindStats) -> str:
    parts = [
        f"{share:.0%} leaves {percent(both[0])} of the magnitude and {percent(both[1])} of the energy"
        for share, both in zip(weight_stats.PRUNED_SHARES, total.kept, strict=True)
        if both is not None and share in (0.5, 0.7)
    ]
    return f"pruning (lossy): {'; '.join(parts)}" if parts else ""


def _exponents(total: KindStats) -> str:
    if total.exponent_entropy is None:
        return ""
    text = f"exponents: {total.exponent_entropy:.2f} bits of information in {total.exponent_bits}"
    if total.exponent_bits == 8 and total.exponent_entropy < 4:
        text += "; a 4-bit code holds nearly all of them (values bf16x12: bf16 in 12 bits, without loss)"
    return text


def _rank(total: KindStats) -> str:
    if total.energy is None or None in total.energy:
        return ""
    parts = [f"{percent(e)} of the energy at rank {r}" for r, e in zip(weight_stats.RANKS, total.energy, strict=True)]
    bound = "" if total.energy_exact else "at least "
    return f"rank: {bound}{', '.join(parts)}"


def _sharing(analysis: Analysis) -> str:
    pairs = analysis.similar()
    if pairs:
        cosine, first, second = pairs[0]
        return (
            f"sharing depth: {len(pairs)} pair(s) of layers with a cosine beyond {SIMILAR}, the most alike {second} "
            f"and {first} ({cosine:.3f})"
        )
    found = [pair for s in analysis.similarities for pair in s.pairs()[:1]]
    if not found:
        return ""
    largest = max(found, key=lambda pair: abs(pair[0]))
    return f"sharing depth: no two layers are alike; the largest cosine is {largest[0]:.3f}"
