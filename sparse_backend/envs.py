"""Every environment variable the package reads.

Environment variables choose how this process runs, never what a model computes: engines do
not hash them, so anything that changes a result is an option (see options.py).
"""

from __future__ import annotations

import os

ISA_VARIABLE = "SPARSE_BACKEND_ISA"


def isa() -> str | None:
    """SPARSE_BACKEND_ISA: scalar, avx2 or avx512 forces a lower kernel level."""
    return os.environ.get(ISA_VARIABLE) or None
