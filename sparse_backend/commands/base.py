"""What commands share: consoles, and errors of one line."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ..errors import OptionError, SparseBackendError
from ..files import write_text

out = Console()
err = Console(stderr=True)


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
