"""What commands share: consoles, and errors of one line."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import OptionError, SparseBackendError
from ..files import write_text

out = Console()
err = Console(stderr=True)

_ANY_WIDTH = 10_000
# To which names fold at most, that numbers find room.
_NAMES_WIDTH = 12


def clean_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are one line and exit code 2, never a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except SparseBackendError as error:
            err.print(f"error: {error}", style="red", highlight=False, soft_wrap=True, markup=False)
            raise typer.Exit(2) from None

    return wrapped


def print_table(table: Table, console: Console = out) -> None:
    """Print a table of which nothing is cut off, however narrow the terminal; where there is none, as wide as it is.

    On a narrow terminal headers wrap, and the first column, of names, folds.
    """
    for column in table.columns:
        column.no_wrap = True
    total = _natural_width(table, console)
    if console.is_terminal and total > console.width:
        for column in table.columns:
            column.no_wrap, column.overflow = False, "fold"
            texts = (*str(column.header).split(), *map(str, column.cells))
            column.width = max(Text.from_markup(text).cell_len for text in texts)
        first = table.columns[0]
        excess = _natural_width(table, console) - console.width
        first.width = max(_NAMES_WIDTH, (first.width or 0) - excess) if excess > 0 else first.width
        total = _natural_width(table, console)
    Console(file=console.file, width=total, force_terminal=console.is_terminal).print(table)


def _natural_width(table: Table, console: Console) -> int:
    return console.measure(table, options=console.options.update(max_width=_ANY_WIDTH)).maximum


def check_writable(option: str, path: Path) -> None:
    """OptionError, before any work is done, if a file cannot be made there."""
    if path.is_dir():
        raise OptionError(f"{option} {path}: is a folder; give the name of a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OptionError(f"{option} {path}: {path.parent} is no folder that can be written to; create it first")


def write_whole(option: str, path: Path, text: str) -> None:
    """Write the file that an option names; it is never half there.

    Raises:
        OptionError: naming the option and the file.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise OptionError(f"{option} {path}: cannot be written: {error}") from None
