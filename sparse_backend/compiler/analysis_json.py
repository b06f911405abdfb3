"""The machine-readable form of an analysis."""

from __future__ import annotations

from typing import Any

from . import weight_stats
from .analyze import Analysis, KindStats, Similarity
from .weight_stats import MatrixStats

VERSION = 1


def to_json(analysis: Analysis) -> dict[str, Any]:
    """An analysis as JSON values. Shares are 0 to 1, null where there is nothing to take a share of.

    Keys:
        version: of this layout, 1.
        model, architecture, machine (null without a prediction), warnings (list of str).
        left_out: {reason: how many 2-D weights were not analysed}.
        total, and kinds (a list, each with `kind`), and projections (a list, each with `module`, `kind`, `layer`,
        `shape`, `dtype`): objects with
            matrices: how many (not of a projection).
            parameters, nonfinite: counts.
            zeros: share of exact zeros.
            below: {"0.001": share of |w| below it, ...}.
            zero_blocks: {"4x4": share of blocks that are all zeros, "16x16": ..., "32x32": ...}.
            fits: {"2:4": share of groups that fit already, "8:16": ...}.
            distinct_values: null for more than 65536; of a kind, the most of one matrix.
            ternary: null or `tensor`, `row`, `group of 128`: what shares a scale; of a kind, {granularity: matrices}.
            exponent_bits, exponent_entropy: width of the exponent field, and its entropy in bits per weight.
            kept: {"0.3": {"magnitude": share of sum |w|, "energy": share of sum w^2}, ...}, after pruning 30%.
            energy_at_rank: {"32": share of sum w^2 in the 32 largest singular values, ...}; null if not computed.
            energy_exact: false where that is a lower bound.
            octaves: {"first": exponent of 2 of the lowest bin, "per_octave": 4, "counts": [...]}: weights by
            magnitude, bins linear in the mantissa; not of a projection.
        similarity: list of {"name", "shape", "modules": [...], "cosine": [[...], ...]}: estimated cosines between
        matrices of one kind.
        similar: list of {"cosine", "modules": [a, b]} with |cosine| of 0.9 and more.
        predictions: list of {"format", "lossy", "seconds", "bytes", "left_dense"}.
    """
    return {
        "version": VERSION,
        "model": str(analysis.folder),
        "architecture": analysis.architecture,
        "machine": analysis.machine,
        "warnings": analysis.warnings,
        "left_out": analysis.left_out,
        "total": _kind(analysis.total()),
        "kinds": [{"kind": kind.kind, **_kind(kind)} for kind in analysis.kinds()],
        "projections": [
            {
                "module": p.module, "kind": p.kind, "layer": p.layer, "shape": list(p.stats.shape),
                "dtype": p.stats.dtype, **_common(p.stats), "ternary": p.stats.ternary,
            }
            for p in analysis.projections
        ],
        "similarity": [_similarity(s) for s in analysis.similarities],
        "similar": [{"cosine": round(c, 4), "modules": [a, b]} for c, a, b in analysis.similar()],
        "predictions": [
            {"format": p.label, "lossy": p.lossy, "seconds": p.seconds, "bytes": p.nbytes, "left_dense": p.left_dense}
            for p in analysis.predictions
        ],
    }  # fmt: skip


def share(part: int, whole: int) -> float | None:
    """part / whole; None of nothing."""
    return part / whole if whole else None


def _kind(kind: KindStats) -> dict[str, Any]:
    octaves = {"first": weight_stats.FIRST_OCTAVE, "per_octave": 4, "counts": kind.octaves.tolist()}
    return {"matrices": kind.matrices, **_common(kind), "ternary": dict(kind.ternary), "octaves": octaves}


def _common(stats: MatrixStats | KindStats) -> dict[str, Any]:
    names = [str(s) for s in weight_stats.PRUNED_SHARES]
    kept = {
        name: None if both is None else {"magnitude": both[0], "energy": both[1]}
        for name, both in zip(names, stats.kept, strict=True)
    }
    ranks = [str(r) for r in weight_stats.RANKS]
    blocks = zip(weight_stats.BLOCKS, stats.zero_blocks, strict=True)
    groups = zip(weight_stats.NM_PATTERNS, stats.nm, strict=True)
    below = zip(weight_stats.THRESHOLDS, stats.below, strict=True)
    return {
        "parameters": stats.parameters,
        "nonfinite": stats.nonfinite,
        "zeros": share(stats.zeros, stats.parameters),
        "below": {str(t): share(count, stats.parameters) for t, count in below},
        "zero_blocks": {f"{size}x{size}": share(*found) for size, found in blocks},
        "fits": {f"{n}:{m}": share(*found) for (n, m), found in groups},
        "distinct_values": stats.distinct,
        "exponent_bits": stats.exponent_bits,
        "exponent_entropy": stats.exponent_entropy,
        "kept": kept,
        "energy_at_rank": None if stats.energy is None else dict(zip(ranks, stats.energy, strict=True)),
        "energy_exact": stats.energy_exact,
    }


def _similarity(similarity: Similarity) -> dict[str, Any]:
    cosine = [[round(value, 4) for value in row] for row in similarity.cosine.tolist()]
    return {
        "name": similarity.name,
        "shape": list(similarity.shape),
        "modules": list(similarity.modules),
        "cosine": cosine,
    }
