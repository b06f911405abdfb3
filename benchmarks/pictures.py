"""Pictures of benchmark results, beside their CSV files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Rows = list[dict[str, Any]]
RESULTS = Path(__file__).parent / "results"


def _save(figure: plt.Figure, name: str) -> Path:
    path = RESULTS / f"{name}.png"
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _legend(axes: plt.Axes) -> None:
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _lines(axes: plt.Axes, rows: Rows, x: str, y: str) -> None:
    for kernel in dict.fromkeys(r["kernel"] for r in rows):
        mine = sorted((r for r in rows if r["kernel"] == kernel), key=lambda r: r[x])
        # Two dense products, and more of ours than there are colours.
        marker = ("o", "s")[len(axes.lines) // 10]
        style = {"F.linear": "k:", "onednn_mm": "k--"}.get(kernel, f"{marker}-")
        axes.plot([r[x] for r in mine], [r[y] for r in mine], style, label=kernel, markersize=4)


def of_kernels(name: str, rows: Rows, cpu: str) -> list[Path]:
    """Time against zeros, time against batch, and a roofline, as far as the rows have them."""
    rows = [r for r in rows if "CSR" not in r["kernel"]]
    threads = max(r["threads"] for r in rows)
    shape = rows[0]["shape"]
    rows = [r for r in rows if r["threads"] == threads and r["shape"] == shape]
    title = f"{shape} {rows[0]['n']}x{rows[0]['k']}, {threads} threads, {cpu}"
    written = []
    first_batch = [r for r in rows if r["batch"] == min(r["batch"] for r in rows)]
    if len({r["zeros"] for r in first_batch}) > 1:
        figure, axes = plt.subplots(figsize=(9.5, 5))
        _lines(axes, first_batch, "zeros", "ms")
        axes.set(xlabel="share of zeros", ylabel="milliseconds", title=f"{title}, batch {first_batch[0]['batch']}")
        axes.set_ylim(bottom=0)
        _legend(axes)
        written.append(_save(figure, f"{name}-zeros"))
    middle = sorted({r["zeros"] for r in rows})[len({r["zeros"] for r in rows}) // 2]
    one_density = [r for r in rows if r["zeros"] == middle]
    if len({r["batch"] for r in one_density}) > 3:
        figure, axes = plt.subplots(figsize=(9.5, 5))
        _lines(axes, one_density, "batch", "ms")
        axes.set(
            xlabel="batch", ylabel="milliseconds", title=f"{title}, {middle:.0%} zeros", xscale="log", yscale="log"
        )
        _legend(axes)
        written.append(_save(figure, f"{name}-batch"))
    written.append(_roofline(name, first_batch, title))
    return written


def _roofline(name: str, rows: Rows, title: str) -> Path:
    """Useful multiply-adds per second over multiply-adds per byte: memory bounds the left side."""
    figure, axes = plt.subplots(figsize=(9.5, 5))
    reads = max(r["read_gb_per_s"] for r in rows)
    for kernel in dict.fromkeys(r["kernel"] for r in rows):
        mine = [r for r in rows if r["kernel"] == kernel]
        work = [r["n"] * r["k"] * r["batch"] for r in mine]
        x = [w / (r["bits_per_weight"] / 8 * r["n"] * r["k"]) for w, r in zip(work, mine, strict=True)]
        y = [w / r["ms"] / 1e6 for w, r in zip(work, mine, strict=True)]
        axes.plot(x, y, "o", label=kernel, markersize=5)
    low, high = axes.get_xlim()
    axes.plot([max(low, 0.05), high], [max(low, 0.05) * reads, high * reads], "k-", label=f"memory, {reads:.0f} GB/s")
    axes.set(
        xlabel="dense multiply-adds per byte read", ylabel="dense multiply-adds per second, billions",
        title=title, xscale="log", yscale="log",
    )  # fmt: skip
    _legend(axes)
    return _save(figure, f"{name}-roofline")


def of_quality(name: str, rows: Rows) -> Path:
    """Perplexity against size."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for row in rows:
        axes.plot(row["mb"], row["perplexity"], "o")
        axes.annotate(
            row["name"], (row["mb"], row["perplexity"]), fontsize=8, xytext=(4, 4), textcoords="offset points"
        )
    axes.set(xlabel="megabytes of projections", ylabel="perplexity", title="shipped model python-lm", yscale="log")
    return _save(figure, name)


def of_pruning(name: str, rows: Rows) -> Path:
    """Perplexity against sparsity, a line or a point per way of pruning."""
    figure, axes = plt.subplots(figsize=(8, 5))
    dense = next(r["perplexity"] for r in rows if r["method"] == "dense")
    axes.axhline(dense, color="k", linestyle="--", label="dense")
    pruned = [r for r in rows if r["method"] != "dense"]
    for way in dict.fromkeys((r["method"], r["pattern"], r["allocation"]) for r in pruned):
        mine = [r for r in pruned if (r["method"], r["pattern"], r["allocation"]) == way]
        label = f"{way[0]}, {way[1]}" + (", equal error" if way[2] == "error" else "")
        lost = [r["perplexity"] for r in mine if r["perplexity"] > 10 * dense]  # would flatten all the others
        if lost:
            axes.plot([], [], " ", label=f"{label}: {', '.join(f'{p:.0f}' for p in lost)}, not drawn")
            continue
        marker = "o-" if way[1] == "unstructured" else "s"
        axes.plot([r["sparsity"] for r in mine], [r["perplexity"] for r in mine], marker, label=label, markersize=5)
    axes.set(xlabel="share of weights pruned", ylabel="perplexity", title="shipped model python-lm", yscale="log")
    axes.legend(fontsize=8)
    return _save(figure, name)
