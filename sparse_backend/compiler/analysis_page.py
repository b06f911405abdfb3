"""An analysis as one HTML file that needs nothing else: no network, no script, pictures as inline SVG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import OptionError
from . import weight_stats
from .analysis_text import Table, findings, label, percent, tables
from .analyze import Analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision; dashes and marks repeat what they say.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#777777")
_DASHES = ("-", "--", "-.", ":", "-", "--", "-.", ":")
_MARKS = "osD^vPX*"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
figure { margin: 1rem 0; } figcaption { color: #444; } svg { display: block; width: 100%; height: auto; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .5rem 0; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #1a1a1a; }
.warning { border-left: 4px solid #D55E00; padding-left: .8rem; } li { overflow-wrap: anywhere; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def need_matplotlib() -> None:
    """OptionError if it is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise OptionError(
            "--html draws its pictures with matplotlib, which is not installed: pip install 'sparse_backend[report]'"
        ) from None


def to_html(analysis: Analysis) -> str:
    """The report.

    Raises:
        OptionError: matplotlib is not installed.
    """
    need_matplotlib()
    title = f"{analysis.folder.resolve().name}: what its weights hold"
    figures = [_histograms(analysis), _depth(analysis), _heat_maps(analysis), _prediction(analysis)]
    warnings = "".join(f'<p class="warning"><strong>Warning:</strong> {_text(w)}</p>' for w in analysis.warnings)
    sections = [
        f"<h1>{_text(title)}</h1>",
        f"<p>{_text(analysis.architecture)}. {len(analysis.projections)} projections, "
        f"{analysis.total().parameters:,} parameters. sparse_backend {__version__}.</p>",
        warnings,
        "<h2>What it means</h2><ul>",
        *(f"<li>{_text(line)}</li>" for line in findings(analysis)),
        "</ul><h2>Pictures</h2>",
        *figures,
        "<h2>Tables</h2>",
        *(_table(table) for table in tables(analysis)),
        f"<h2>Every projection</h2><details><summary>{len(analysis.projections)} matrices</summary>",
        _table(_projections(analysis)),
        "</details>",
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head><body><main>\n"
        + "\n".join(s for s in sections if s)
        + "\n</main></body></html>\n"
    )


def _text(text: str) -> str:
    return html.escape(text)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.header)
    rows = []
    for first, *cells in table.rows:
        numbers = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{_text(first)}</th>{numbers}</tr>')
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{_text(table.title)}"><table>'
        f"<caption>{_text(table.title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _projections(analysis: Analysis) -> Table:
    half, rank = weight_stats.PRUNED_SHARES.index(0.5), weight_stats.RANKS.index(128)
    rows = []
    for p in analysis.projections:
        s = p.stats
        kept = s.kept[half]
        rows.append((
            p.module, f"{s.shape[0]} x {s.shape[1]}", s.dtype, percent(1 - s.density),
            percent(s.below[2] / s.parameters if s.parameters else None), percent(kept[0] if kept else None),
            percent(s.energy[rank] if s.energy else None), s.ternary or "-",
        ))  # fmt: skip
    header = ("module", "shape", "dtype", "zeros", "<0.01", "kept, 50%", "rank 128", "ternary")
    return Table("One row per matrix", header, rows)


def _figure(name: str, alt: str, width: float, height: float, draw: Callable[[Figure], None]) -> str:
    """A picture as <figure> with an inline SVG; `name` sets its ids apart, `alt` says in words what it shows."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text; names from a checkpoint are no formulas; no address of anyone in the file.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{_text(alt)}"', 1)
    return f"<figure>{svg}<figcaption>{_text(alt)}</figcaption></figure>"


def _histograms(analysis: Analysis) -> str:
    from matplotlib.ticker import PercentFormatter

    kinds = analysis.kinds()
    centers, widths = weight_stats.octave_bins()

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, k in enumerate(kinds):
            density = k.octaves / max(1, k.parameters) / widths
            shown = density > 1e-4
            axes.plot(centers[shown], density[shown], **_style(i), label=label(k.kind))
        for threshold in weight_stats.THRESHOLDS:
            axes.axvline(threshold, color="#999", linewidth=0.8)
        axes.set(xscale="log", xlabel="magnitude of a weight", ylabel="share of weights per octave", ylim=(0, None))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(ncols=2)

    alt = (
        "Histogram of magnitudes per kind, zeros left out. Vertical lines stand at 0.001, 0.005, 0.01 and 0.02; "
        + "; ".join(f"{label(k.kind)}: {percent(k.below[2] / max(1, k.parameters))} below 0.01" for k in kinds)
    )
    return _figure("histograms", alt, 8, 4, draw)


def _style(i: int) -> dict[str, Any]:
    return {"color": _COLOURS[i], "linestyle": _DASHES[i], "marker": _MARKS[i], "markersize": 4, "markevery": 4}


def _depth(analysis: Analysis) -> str:
    from matplotlib.ticker import PercentFormatter

    lines: dict[str, dict[int, list[int]]] = {}
    for p in analysis.projections:
        if p.layer is not None:
            sums = lines.setdefault(p.kind, {}).setdefault(p.layer, [0, 0, 0])
            for i, count in enumerate((p.stats.zeros, p.stats.below[2], p.stats.parameters)):
                sums[i] += count
    if not lines:
        return ""
    order = [k.kind for k in analysis.kinds()]

    def panel(axes: Axes, part: int, title: str) -> None:
        for i, kind in enumerate(order):
            points = [(layer, s[part] / s[2]) for layer, s in sorted(lines.get(kind, {}).items()) if s[2]]
            if points:
                axes.plot(*zip(*points, strict=True), **{**_style(i), "markevery": 1}, label=label(kind))
        axes.set(xlabel="layer", title=title, ylim=(0, None))
        axes.yaxis.set_major_formatter(PercentFormatter(1))

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        panel(left, 0, "exact zeros")
        panel(right, 1, "below 0.01")
        right.legend(fontsize=7)

    total = analysis.total()
    alt = (
        f"Sparsity by depth: share of exact zeros (left; {percent(total.zeros / max(1, total.parameters))} over all "
        f"layers) and of weights below 0.01 (right; {percent(total.below[2] / max(1, total.parameters))} over all "
        "layers) per layer and kind."
    )
    return _figure("depth", alt, 8, 3.5, draw)


def _heat_maps(analysis: Analysis) -> str:
    found = analysis.similarities
    if not found:
        return ""
    columns = min(4, len(found))
    rows = -(-len(found) // columns)

    def draw(figure: Figure) -> None:
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in grid[len(found) :]:
            axes.set_visible(False)
        for axes, s in zip(grid, found, strict=False):
            image = axes.imshow(s.cosine.numpy(), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
            axes.set_title(f"{s.name}, {s.shape[0]} x {s.shape[1]}", fontsize=7)
            axes.tick_params(labelsize=6)
        figure.colorbar(image, ax=grid, label="cosine")

    parts = []
    for s in found:
        cosine, first, second = s.pairs()[0]
        parts.append(f"{s.name} {s.shape[0]} x {s.shape[1]}: {cosine:.3f} between {second} and {first}")
    alt = (
        "Cosine similarity between layers of one kind and shape, in their order by depth, estimated from "
        f"{weight_stats.SKETCH} weights at fixed positions. The most alike: {'; '.join(parts)}."
    )
    return _figure("similarity", alt, 8, 1 + 2.1 * rows, draw)


def _prediction(analysis: Analysis) -> str:
    predictions = analysis.predictions
    if not predictions:
        return ""

    def bars(axes: Axes, values: list[float], unit: str) -> None:
        for i, (p, value) in enumerate(zip(predictions, values, strict=True)):
            hatch, colour = ("//", "#f3c9a5") if p.lossy else ("", _COLOURS[0])
            axes.barh(i, value, color=colour, hatch=hatch, edgecolor="#1a1a1a", linewidth=0.6)
            axes.annotate(f" {value:.2f}", (value, i), va="center", fontsize=7)
        axes.set(xlabel=unit, yticks=range(len(predictions)), xlim=(0, 1.15 * max(values)))

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        bars(left, [1e3 * p.seconds for p in predictions], "milliseconds")
        bars(right, [p.nbytes / 1e6 for p in predictions], "megabytes")
        left.invert_yaxis()
        left.set_yticklabels([f"{p.label}{' (lossy)' if p.lossy else ''}" for p in predictions])

    alt = (
        f"Predicted time (left) and size (right) of all projections per format on {analysis.machine}; hatched bars "
        "are lossy. " + "; ".join(f"{p.label}: {1e3 * p.seconds:.2f} ms, {p.nbytes / 1e6:.1f} MB" for p in predictions)
    )
    return _figure("prediction", alt, 8, 0.8 + 0.28 * len(predictions), draw)
