"""The capability table: which op runs which format where. Choosing always gives a reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import IsaError, OptionError
from ..packed import MachineWeight
from . import cpu


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        format: the format it runs.
        device: torch device type.
        op: name under torch.ops.sparse_backend; called as op(x, *tensors, bias, N).
        values: dtypes of stored values it takes.
        implementation: the name of the code that would run for values of a dtype.
        isas: levels it has code for; a level absent here uses the next lower one.
    """

    format: str
    device: str
    op: str
    values: tuple[torch.dtype, ...]
    isas: tuple[str, ...]
    implementation: Callable[[torch.dtype], str]
    _resolved: list[Callable[..., Any]] = dataclasses.field(default_factory=list, repr=False, compare=False)

    def function(self) -> Callable[..., Any]:
        """The torch op, with the library loaded."""
        if not self._resolved:
            self._resolved.append(getattr(cpu.ops(), self.op).default)
        return self._resolved[0]

    def call(
        self, x: torch.Tensor, tensors: Sequence[torch.Tensor], bias: torch.Tensor | None, out_features: int
    ) -> torch.Tensor:
        """y [..., N] from the machine form's tensors."""
        y: torch.Tensor = self.function()(x, *tensors, bias, out_features)
        return y

    def run(self, x: torch.Tensor, weight: MachineWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """y [..., N] from a machine form."""
        return self.call(x, tuple(weight.tensors.values()), bias, weight.shape[0])


_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (*_HALVES, torch.float32)

KERNELS = (
    Kernel("bitmask", "cpu", "bitmask_linear", _HALVES, cpu.ISA_LEVELS, cpu.bitmask_kernel),
    Kernel("nm", "cpu", "bitmask_linear", _HALVES, cpu.ISA_LEVELS, cpu.bitmask_kernel),
    Kernel("sell", "cpu", "sell_linear", _HALVES, cpu.ISA_LEVELS, cpu.sell_kernel),
    Kernel("block", "cpu", "lanes_linear", _HALVES, cpu.ISA_LEVELS, cpu.lanes_kernel),
    Kernel("bf16x12", "cpu", "lanes_linear", (torch.bfloat16,), cpu.ISA_LEVELS, cpu.lanes_kernel),
    Kernel("int4", "cpu", "lanes_linear", _FLOATS, cpu.ISA_LEVELS, cpu.lanes_kernel),
    Kernel("ternary", "cpu", "lowbit_linear", _FLOATS, cpu.ISA_LEVELS, cpu.lowbit_kernel),
    Kernel("int8", "cpu", "lowbit_linear", _FLOATS, cpu.ISA_LEVELS, cpu.lowbit_kernel),
)
_BY_FORMAT = {k.format: k for k in KERNELS}


def kernel(format: str) -> Kernel:
    """The row of a format."""
    return _BY_FORMAT[format]


def select(format: str, device: str, values: torch.dtype, isa: str | None = None) -> tuple[Kernel, str]:
    """The kernel for a format here, and why.

    Args:
        format: name of the format.
        device: torch device type.
        values: dtype of the stored values.
        isa: a level to insist on; None for the active one.

    Raises:
        OptionError: no row of the table fits.
        IsaError: the machine lacks the level.
    """
    row = _BY_FORMAT.get(format)
    if row is None or row.device != device:
        have = ", ".join(f"{k.format} on {k.device}" for k in KERNELS)
        raise OptionError(f"no kernel for format '{format}' on device '{device}'; there are: {have}")
    if values not in row.values:
        raise OptionError(f"no {format} kernel for values of {values}; there are: {', '.join(map(str, row.values))}")
    if isa is not None and isa not in cpu.available_levels():
        raise IsaError(f"this machine has no level '{isa}'; it has {', '.join(cpu.available_levels())}")
    row.function()  # loaded now: torch.compile cannot trace loading a library
    name = row.implementation(values)
    return row, f"{row.op} ({name}): best level of this machine" if isa is None else f"{row.op} at {isa}: asked for"
