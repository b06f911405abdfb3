"""Every environment variable the package reads.

Environment variables choose how this process runs, never what a model computes: engines do
not hash them, so anything that changes a result is an option (see options.py). (A profile chooses
between formats that hold the same numbers, or under values int8 and int4 between rounding and
dense; what became of every projection is hashed.)
"""

from __future__ import annotations

import os

ISA_VARIABLE = "SPARSE_BACKEND_ISA"
PROFILE_VARIABLE = "SPARSE_BACKEND_PROFILE"
PRUNE_PYTHON_VARIABLE = "SPARSE_BACKEND_PRUNE_PYTHON"


def isa() -> str | None:
    """SPARSE_BACKEND_ISA: scalar, avx2, avx512 or amx forces a kernel level, at most the machine's."""
    return os.environ.get(ISA_VARIABLE) or None


def prune_python() -> str | None:
    """SPARSE_BACKEND_PRUNE_PYTHON: the Python of the environment that has llm-compressor (method sparsegpt)."""
    return os.environ.get(PRUNE_PYTHON_VARIABLE) or None


def profile() -> str | None:
    """SPARSE_BACKEND_PROFILE: a machine profile to plan with, instead of measuring this machine."""
    return os.environ.get(PROFILE_VARIABLE) or None
