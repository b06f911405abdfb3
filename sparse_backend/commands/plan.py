"""`sparse-backend plan` and `sparse-backend calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..report import human_bytes
from .base import check_writable, clean_errors, err, out, print_table, write_whole


def _measure(again: bool) -> Any:
    """This machine's profile, with a bar if it has to be measured."""
    from ..compiler.calibrate import current_profile

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=err, transient=True
    ) as bar:
        task = bar.add_task("measuring kernels", total=None)

        def progress(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=f"measuring {name}")

        return current_profile(progress, again)


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"


@clean_errors
def plan(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder: plain, compiled or BitNet.", show_default=False)],
    batch: Annotated[int, typer.Option(min=1, help="Tokens per step to plan for.")] = 1,
    format: Annotated[str, typer.Option(help="auto, or the one format to predict.")] = "auto",
    values: Annotated[
        str | None, typer.Option(help="Values of sparse formats, as for compile; int8 and int4 round.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="As if pruned to this share first, by magnitude.")] = None,
    pattern: Annotated[str, typer.Option(help="Zeros that --sparsity makes, as for compile.")] = "unstructured",
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan for the machine of this profile (see calibrate).")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write every prediction as JSON.")
    ] = None,
) -> None:
    """Show, per projection, the format this machine would run fastest, and the runner-up.

    Times are microseconds of one step as the cost model predicts them; the machine is measured once
    (20 s) and remembered. Engines and compile plan the same way. Nothing is written.

    Example: sparse-backend plan ./llama-pruned --batch 8
    """
    from ..compiler.cost import Profile
    from ..compiler.planning import plan_weights
    from ..options import Options

    options = Options(format=format, values=values, sparsity=sparsity, pattern=pattern, batch=batch)
    if json_file is not None:
        check_writable("--json", json_file)
    machine = Profile.load(profile) if profile is not None else _measure(False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("planning", total=None)

        def progress(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name[-40:])

        planned = plan_weights(model, options, machine, progress, lambda text: err.print(text, highlight=False))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("projection")
    for name in ("shape", "choice", "us", "gain", "runner-up", "us"):
        table.add_column(name, justify="left" if name in ("choice", "runner-up") else "right")
    for p in planned:
        other = p.runner_up
        table.add_row(
            escape(p.module.removeprefix("model.")), f"{p.shape[0]}x{p.shape[1]}", p.chosen.name,
            _microseconds(p.chosen.seconds), f"{p.dense.seconds / p.chosen.seconds:.2f}x",
            other.name if other else "-", _microseconds(other.seconds) if other else "-",
        )  # fmt: skip
    print_table(table)
    chosen, dense = sum(p.chosen.seconds for p in planned), sum(p.dense.seconds for p in planned)
    out.print(
        f"{len(planned)} projections, {batch} token(s) a step: {_microseconds(chosen)} us planned, "
        f"{_microseconds(dense)} us dense ({dense / max(chosen, 1e-12):.2f}x); "
        f"{human_bytes(sum(p.chosen.nbytes for p in planned))} of {human_bytes(sum(p.dense.nbytes for p in planned))}",
        highlight=False,
    )
    out.print(f"machine: {machine.machine}, reads {human_bytes(machine.bandwidth)}/s", highlight=False, markup=False)
    if json_file is not None:
        data = [
            {
                "module": p.module, "shape": list(p.shape), "choice": p.chosen.name, "reason": p.reason,
                "predictions": [
                    {"format": q.format, "values": q.values, "seconds": q.seconds, "bytes": q.nbytes}
                    for q in p.predictions
                ],
            }
            for p in planned
        ]  # fmt: skip
        document = {"machine": machine.machine, "batch": batch, "projections": data}
        write_whole("--json", json_file, json.dumps(document, indent=1) + "\n")


@clean_errors
def calibrate(
    to: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Also write the profile here, to ship or to plan elsewhere."),
    ] = None,
) -> None:
    """Measure this machine's kernels again (20 s); plans use the figures from then on.

    Measured by itself once per machine and thread count; do it again when the machine was busy. The
    environment variable SPARSE_BACKEND_PROFILE makes every process plan with a profile file instead.

    Example: sparse-backend calibrate --out icelake.json
    """
    from ..compiler import calibrate as measuring

    if to is not None:
        check_writable("--out", to)
    profile = _measure(True)
    table = Table("kernel", box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("1 token", "8", "64", "exponent"):
        table.add_column(name, justify="right")
    at = [profile.batches.index(b) for b in (1, 8, 64)]
    for name, k in profile.kernels.items():
        rates = [f"{k.per_position(1.0)[i] * 1e12:,.0f}" for i in at]
        table.add_row(name, *rates, f"{k.exponent[0]:.1f}")
    out.print(
        "picoseconds per weight, all of them stored, from the cache; memory: of the shorter of both times at 1 token"
    )
    out.print(table)
    out.print(f"{profile.machine}: reads {human_bytes(profile.bandwidth)}/s", highlight=False, markup=False)
    if to is not None:
        measuring.save(profile, to)
        out.print(f"wrote {to}", highlight=False, markup=False)
