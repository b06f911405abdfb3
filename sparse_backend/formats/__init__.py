"""Storage formats, one file each. `get_format(name)` gives the one definition of a format."""

from __future__ import annotations

from ..errors import OptionError
from .base import Candidate, Format, TensorSpec, naive_linear
from .bitmask import Bitmask
from .int8 import Int8
from .sell import Sell
from .ternary import Ternary

FORMATS: dict[str, Format] = {f.name: f for f in (Bitmask(), Sell(), Ternary(), Int8())}

__all__ = ["FORMATS", "Candidate", "Format", "TensorSpec", "get_format", "naive_linear"]


def get_format(name: str) -> Format:
    """The format called `name`; OptionError lists the names there are."""
    if name not in FORMATS:
        raise OptionError(f"format '{name}' stores nothing by itself; formats: {', '.join(FORMATS)}")
    return FORMATS[name]
