"""The `sparse-backend` command. Errors are one line and exit code 2, never a traceback."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from . import __version__
from .commands.analyze import analyze
from .commands.base import clean_errors as _clean_errors
from .commands.base import err, out
from .commands.plan import calibrate, plan
from .errors import OptionError
from .report import Report, human_bytes

app = typer.Typer(
    help="Serve pruned language models smaller and faster: convert, look inside, check the machine, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        out.print(f"sparse_backend {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _rules(values: list[str]) -> tuple[dict[str, Any], ...]:
    rules = []
    for text in values:
        try:
            rules.append(json.loads(text))
        except ValueError:
            raise OptionError(
                f'--rule {text!r} is not JSON; write for example --rule \'{{"match": "*.down_proj", "sparsity": 0.7}}\''
            ) from None
    return tuple(rules)


@app.command("compile")
@_clean_errors
def compile_command(
    model: Annotated[
        Path, typer.Argument(help="Checkpoint folder in Hugging Face layout (safetensors).", show_default=False)
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to create; must not exist.", show_default=False)
    ],
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="F",
            help="Options from a YAML or JSON file, same keys as in config.json. Flags given here win over it.",
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Prune this share of the weights first (lossy). Default: keep the zeros there are."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="How to prune: magnitude, or wanda or sparsegpt with --calibration. Default: magnitude."),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="Which zeros: unstructured, 2:4, 4:8, 8:16, 6:16, 4:16, block:16x16, block:32x32. "
            "Default: unstructured."
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="uniform: --sparsity for every projection; error: the same error, --sparsity on average. "
            "Default: uniform."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="F", help="Plain text for wanda and sparsegpt, of the kind the model is used for."),
    ] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="Tokens of it to use at most. Default: 32768.")] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="auto (the fastest lossless), dense, bitmask, sell, nm, block, bf16x12, or one that rounds what is "
            "not exact: ternary, int8, int4. Default: auto."
        ),
    ] = None,
    values: Annotated[
        str | None,
        typer.Option(
            help="Values of sparse formats: bf16, fp16, bf16x12 (bf16 in 12 bits), int8 or int4 (both round). "
            "Default: the checkpoint's own dtype."
        ),
    ] = None,
    bits: Annotated[
        float | None, typer.Option(help="Storage of ternary weights: 2 or 1.6. Default: the faster one.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Columns per scale where --format ternary or int4 or --values int8 or int4 round: 128, 256; but for "
            "sell also 64; for ternary, int4 and block also 32. Default: one scale per row (ternary: in all), int4 128."
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(help="Of ternary, int8 and int4 weights: keep, or int8 per token. Default: as trained."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Tokens per step that auto plans formats for. Default: 1.")] = None,
    lm_head: Annotated[
        str | None,
        typer.Option(help="keep, or int8: the engine rounds the output head as it loads. Default: keep."),
    ] = None,
    to: Annotated[
        str,
        typer.Option(help="sparse-compiled, or bitnet: Hugging Face's packing, which transformers reads too."),
    ] = "sparse-compiled",
    ignore: Annotated[
        list[str] | None, typer.Option(help="Modules to leave dense: fnmatch or re:..., repeatable.")
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help='Per-module options, repeatable, first match wins: \'{"match": "*.down_proj", "sparsity": 0.7}\''
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and pack everything, print the plan and sizes; write nothing.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read OUT back and compare every tensor with MODEL before it appears.")
    ] = False,
) -> None:
    """Convert a checkpoint once; OUT is then served with no flag at all.

    Reads MODEL tensor by tensor and never changes it. Without --sparsity and --format the result
    computes exactly what MODEL computes. OUT appears only when it is complete. What an interrupted
    run finished is kept in .OUT.incomplete; the same command goes on from there.

    Examples: sparse-backend compile ./llama ./llama-50 --sparsity 0.5;
    sparse-backend compile ./llama ./llama-50 --recipe half.yaml --dry-run;
    sparse-backend compile ./bitnet-compiled ./bitnet-hf --to bitnet
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from .compiler import recipe as recipes
    from .compiler.compile import compile_checkpoint, plan_checkpoint
    from .compiler.pruning.text import DEFAULT_TOKENS, Calibration
    from .compiler.work import folder_of
    from .options import Options

    given = {
        "format": format, "values": values, "sparsity": sparsity, "method": method,
        "pattern": pattern, "allocation": allocation,
        "bits": bits, "group_size": group_size, "activations": activations, "batch": batch,
        "lm_head": lm_head,
        "ignore": ignore or None, "rules": _rules(rule) if rule else None,
    }  # fmt: skip
    keys = recipes.read(recipe) if recipe is not None else {}
    options = Options.from_dict({**keys, **{key: value for key, value in given.items() if value is not None}})
    if calibration is None and calibration_tokens is not None:
        raise OptionError("--calibration-tokens says how much of --calibration FILE to use; pass that too")
    text = None
    if calibration is not None:
        text = Calibration(calibration, DEFAULT_TOKENS if calibration_tokens is None else calibration_tokens)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("compiling", total=None)

        def progress(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what[-50:])

        def say(text: str) -> None:
            bar.console.print(text, style="yellow", highlight=False, soft_wrap=True, markup=False)

        try:
            if dry_run:
                report = plan_checkpoint(model, options, progress, to, say, text)
            else:
                command = shlex.join(["sparse-backend", *sys.argv[1:]])
                report = compile_checkpoint(
                    model, target, options, progress, layout=to, verify=verify, say=say,
                    command=command, calibration=text,
                )  # fmt: skip
        except KeyboardInterrupt:
            if dry_run:
                say("interrupted; a dry run writes nothing, so nothing is kept")
            elif folder_of(target).exists():  # without a whole shard it is removed
                say("interrupted; shards that are whole are kept, the same command goes on from them")
            else:
                say("interrupted before the first shard was whole; nothing is kept")
            raise typer.Exit(130) from None
    _show_plan(report, target, dry_run)
    if dry_run:
        return
    if verify:
        out.print("verified: every tensor is what it was made from", highlight=False)
    out.print(f"Serve it: sparse-backend serve {target}", highlight=False, markup=False)


def _show_plan(report: Report, target: Path, dry_run: bool) -> None:
    title = f"{target} (not written)" if dry_run else str(target)
    table = Table("format", "projections", "before", "after", title=escape(title), title_justify="left")
    for name, (count, before, after) in report.by_format().items():
        table.add_row(name, str(count), human_bytes(before), human_bytes(after))
    out.print(table)
    for reason, count in report.dense_reasons().items():
        out.print(f"dense: {count} x {reason}", highlight=False)
    out.print(f"all tensors: {human_bytes(report.total_bytes)}", highlight=False)
    for what, count in report.changed.items():
        out.print(
            f"{count} projections {what}: this model differs from the original; check its quality before serving it.",
            highlight=False,
        )


@app.command()
@_clean_errors
def inspect(
    model: Annotated[Path, typer.Argument(help="Compiled (or plain) checkpoint folder.", show_default=False)],
    modules: Annotated[bool, typer.Option("--modules", help="One row per projection.")] = False,
    kinds: Annotated[bool, typer.Option("--kinds", help="One row per kind (q_proj, ...) and format.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also read every packed tensor and check its checksum.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a compiled checkpoint holds; headers are always verified."""
    from .compiler import inspection

    info = inspection.inspect(model, verify=verify)
    if as_json:
        typer.echo(json.dumps(info.to_json(), indent=2))
        return
    out.print(
        f"{model}: {info.architecture}, {len(info.rows)} packed modules of {info.module_count} with a 2-D weight",
        highlight=False,
    )
    if info.options:
        out.print(f"options: {json.dumps(info.options)}", highlight=False, markup=False)
    if modules:
        first, rows = "module", [*info.rows, *info.dense_rows]
    else:
        first, rows = ("kind", info.by_kind()) if kinds else ("format", info.by_format())
    table = Table(first, "modules", "shape", "zeros", "density", "bits/weight", "dense", "stored")
    for row in rows:
        shares = ["-" if share is None else f"{share:.1%}" for share in (row.zeros, row.density)]
        table.add_row(
            row.name, str(row.count), row.shape, *shares, f"{row.bits_per_weight:.2f}",
            human_bytes(row.dense_bytes), human_bytes(row.packed_bytes),
        )  # fmt: skip
    if rows:
        out.print(table)
    if verify and info.rows:
        out.print("all checksums match", highlight=False)
    elif verify:
        out.print("no checksums to check: only packed modules have them, and there are none", highlight=False)


@app.command()
@_clean_errors
def doctor() -> None:
    """Show the machine, the kernel levels it runs, and whether the engines see this plugin."""
    from . import diagnosis

    table = Table("what", "found", title=f"sparse_backend {__version__}", title_justify="left")
    healthy = True
    with err.status("asking the engines (a few seconds)"):
        for check in diagnosis.run():
            table.add_row(check.name, check.text if check.ok else f"[red]{check.text}[/red]")
            healthy &= check.ok
    out.print(table)
    if not healthy:
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@_clean_errors
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub name, plain or compiled.", show_default=False)],
    engine: Annotated[str, typer.Option(help="Engine to run: vllm or sglang (of this environment).")] = "vllm",
    show: Annotated[
        bool, typer.Option("--show", help="Print the command and environment instead of running it.")
    ] = False,
) -> None:
    """Run the engine's own OpenAI-compatible server with this plugin and sensible settings.

    Sets what this machine needs (threads, KV-cache size; your own environment variables win)
    and passes everything after -- to the engine.

    Example: sparse-backend serve ./llama-50 -- --port 8000 --max-model-len 4096
    """
    from . import serving

    command, environment = serving.prepare(model, engine, context.args)
    if show:
        for key, value in environment.items():
            typer.echo(f"{key}={value}")
        typer.echo(" ".join(command))
        return
    serving.run(command, environment)


@app.command()
@_clean_errors
def patch(
    engine: Annotated[str, typer.Argument(help="Engine to patch: sglang.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change; write nothing.")] = False,
    reverse: Annotated[bool, typer.Option("--reverse", help="Take the patch out again.")] = False,
    site_packages: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder the engine is installed in. Default: this environment's."),
    ] = None,
) -> None:
    """Make an older SGLang (0.5.2 to 0.5.10) load plugins, as 0.5.11 and later do by themselves.

    Changes the installed files only if every one of them is its wheel's own; --reverse gives the
    same bytes back. Do that before you upgrade or uninstall SGLang.

    Example: sparse-backend patch sglang --dry-run --site-packages ./venv/lib/python3.11/site-packages
    """
    from . import patching

    report = patching.patch_engine(engine, reverse, dry_run, site_packages)
    typer.echo(f"{engine} {report.version} in {report.folder}")
    for change in report.changes:
        typer.echo(f"  {'would ' if dry_run else ''}{change.verb} {change.name}")
    if not report.changes:
        typer.echo("not patched: nothing to do" if reverse else "already patched: nothing to do")
    elif not dry_run:
        typer.echo("patch taken out" if reverse else f"patched: {report.patch.gives}")


for _command in (analyze, plan, calibrate):
    app.command()(_command)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
