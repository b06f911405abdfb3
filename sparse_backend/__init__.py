"""Compiled sparse storage and kernels for the linear layers of language models.

    import sparse_backend as sb
    p = sb.pack(weight, format="bitmask")   # weight [N, K] -> canonical form
    y = sb.linear(x, p)                     # x [..., K] -> [..., N]

Names are loaded when first used: importing the package imports neither torch nor an engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import SparseLinear, linear, pack
    from .errors import (
        CheckpointError,
        IsaError,
        OptionError,
        SparseBackendError,
        WeightError,
    )
    from .options import Options
    from .packed import MachineWeight, PackedWeight

__version__ = "0.1.0"

_HOME = {
    "pack": "api",
    "linear": "api",
    "SparseLinear": "api",
    "PackedWeight": "packed",
    "MachineWeight": "packed",
    "Options": "options",
    "SparseBackendError": "errors",
    "OptionError": "errors",
    "CheckpointError": "errors",
    "WeightError": "errors",
    "IsaError": "errors",
}

__all__ = [
    "CheckpointError",
    "IsaError",
    "MachineWeight",
    "OptionError",
    "Options",
    "PackedWeight",
    "SparseBackendError",
    "SparseLinear",
    "WeightError",
    "linear",
    "pack",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sparse_backend' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
