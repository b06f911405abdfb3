"""Files that are never half-written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name beside it, and rename it once it is on disk.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        part = Path(file.name)
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            part.chmod(0o644)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def cache_folder() -> Path:
    """Where what was measured of this machine is kept for its user."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # without a home, in this folder
    return Path(base) / "sparse_backend"
