"""`sparse-backend analyze`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .base import check_writable, clean_errors, err, out, print_table, write_whole


@clean_errors
def analyze(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder: plain, compiled or BitNet.", show_default=False)],
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Also write everything, per matrix too, as JSON.", show_default=False
        ),
    ] = None,
    html_file: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Also write a report with pictures: one file, opens offline.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        bool, typer.Option("--rank/--no-rank", help="Energy at rank 32, 128 and 512: most of the time it takes.")
    ] = True,
    predict: Annotated[
        bool, typer.Option("--predict/--no-predict", help="Time per format; measures this machine once (20 s).")
    ] = True,
    batch: Annotated[int, typer.Option(min=1, help="Rows of activations to predict times for.")] = 1,
) -> None:
    """Show what is in a model's weights, and what that would gain.

    Reads MODEL once, tensor by tensor, and changes nothing. Per kind of projection: how small the
    weights are, zeros and their patterns, ternary weights, what pruning would leave, how much a low
    rank holds, which layers are alike; and, as this machine's cost model predicts it, time and size
    in every format. --json documents its keys in sparse_backend/compiler/analysis_json.py.

    Example: sparse-backend analyze ./llama --html report.html --json report.json
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from ..compiler import analysis_json, analysis_page, analysis_text, checkpoint
    from ..compiler.analyze import analyze as analyze_checkpoint
    from ..compiler.calibrate import current_profile

    for option, path in (("--json", json_file), ("--html", html_file)):
        if path is not None:
            check_writable(option, path)
    if html_file is not None:
        analysis_page.need_matplotlib()
    checkpoint.read(model)  # what is wrong with it is said before this machine is measured
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("analysing", total=None)
        profile = current_profile() if predict else None

        def progress(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name[-40:])

        analysis = analyze_checkpoint(model, progress, rank, profile, batch)
    for warning in analysis.warnings:
        err.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    out.print(f"{model}: {analysis.architecture}", highlight=False, markup=False)
    for found in analysis_text.tables(analysis):
        out.print(f"\n{found.title}", highlight=False, markup=False)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        for i, column in enumerate(found.header):
            table.add_column(column, justify="right" if i else "left")
        for row in found.rows:
            table.add_row(*map(escape, row))
        print_table(table)
    out.print()
    for line in analysis_text.findings(analysis):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    if json_file is not None:
        text = json.dumps(analysis_json.to_json(analysis), indent=1, allow_nan=False)
        write_whole("--json", json_file, text + "\n")
    if html_file is not None:
        write_whole("--html", html_file, analysis_page.to_html(analysis))
