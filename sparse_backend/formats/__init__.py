"""Storage formats, one file each. `get_format(name)` gives the one definition of a format."""

from __future__ import annotations

from ..errors import OptionError
from .base import Candidate, Format, TensorSpec, naive_linear
from .bf16x12 import Bf16x12
from .bitmask import Bitmask
from .block import Block
from .int4 import Int4
from .int8 import Int8
from .nm import Nm
from .sell import Sell
from .ternary import Ternary

FORMATS: dict[str, Format] = {
    f.name: f for f in (Nm(), Bitmask(), Sell(), Block(), Ternary(), Bf16x12(), Int8(), Int4())
}

__all__ = ["FORMATS", "Candidate", "Format", "TensorSpec", "get_format", "naive_linear"]


def get_format(name: str) -> Format:
    """The format called `name`; OptionError lists the names there are."""
    if name not in FORMATS:
        raise OptionError(f"format '{name}' stores nothing by itself; formats: {', '.join(FORMATS)}")
    return FORMATS[name]
