"""The capability table: which op runs which format where. Choosing always gives a reason.

A row also says how a packed weight becomes what its op reads, so a format on another device is one file with the
kernels and one row here. CPU rows lower through the format, in C++. GPU rows name a module of `kernels/triton`,
imported when it is first used: the package works where Triton is not installed.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import IsaError, OptionError
from ..packed import MachineWeight, PackedWeight
from . import cpu


@dataclasses.dataclass(frozen=True)
class Kernel(abc.ABC):
    """One row of the table.

    Attributes:
        format: the format it runs.
        device: torch device type.
        op: name under torch.ops.sparse_backend; called as op(x, *tensors, bias, N).
        values: dtypes of stored values it takes.
    """

    format: str
    device: str
    op: str
    values: tuple[torch.dtype, ...]
    _resolved: list[Callable[..., Any]] = dataclasses.field(
        default_factory=list, init=False, repr=False, compare=False, kw_only=True
    )

    @abc.abstractmethod
    def load(self) -> Any:
        """`torch.ops.sparse_backend`, with this row's op registered."""

    @abc.abstractmethod
    def lower(self, packed: PackedWeight, device: torch.device) -> MachineWeight:
        """What the op reads, made from the canonical form, on `device`."""

    def refusal(self, packed: PackedWeight) -> str | None:
        """Why the op cannot run a weight of its format, in words; None if it can."""
        return None

    @abc.abstractmethod
    def implementation(self, values: torch.dtype) -> str:
        """The name of the code that runs for values of a dtype."""

    @abc.abstractmethod
    def check_isa(self, isa: str | None) -> str:
        """Why this row, in words; IsaError if the device lacks the level that is asked for."""

    def function(self) -> Callable[..., Any]:
        """The torch op, with its library loaded."""
        if not self._resolved:
            self._resolved.append(getattr(self.load(), self.op).default)
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


@dataclasses.dataclass(frozen=True)
class CpuKernel(Kernel):
    """A row of the C++ library.

    Attributes:
        code: the name of the code that would run for values of a dtype.
        isas: levels it has code for; a level absent here uses the next lower one.
    """

    code: Callable[[torch.dtype], str]
    isas: tuple[str, ...] = cpu.ISA_LEVELS

    def load(self) -> Any:  # noqa: D102
        return cpu.ops()

    def lower(self, packed: PackedWeight, device: torch.device) -> MachineWeight:  # noqa: D102
        from ..formats import get_format

        return get_format(packed.format).lower(packed)

    def implementation(self, values: torch.dtype) -> str:  # noqa: D102
        return self.code(values)

    def check_isa(self, isa: str | None) -> str:  # noqa: D102
        if isa is None:
            return "best level of this machine"
        if isa not in cpu.available_levels():
            raise IsaError(f"this machine has no level '{isa}'; it has {', '.join(cpu.available_levels())}")
        return f"level {isa} asked for"


@dataclasses.dataclass(frozen=True)
class TritonKernel(Kernel):
    """A row of Triton kernels.

    Attributes:
        module: file of `kernels/triton` that registers the op and has `lower(packed, device)`.
    """

    module: str

    def _module(self) -> Any:
        try:
            importlib.import_module("triton")
        except ImportError as error:
            raise IsaError(
                f"{self.format} on {self.device} needs Triton 3.6 or later, which does not import here ({error}): "
                "pip install triton"
            ) from None
        return importlib.import_module(f".triton.{self.module}", __package__)

    def load(self) -> Any:  # noqa: D102
        self._module()
        return torch.ops.sparse_backend

    def lower(self, packed: PackedWeight, device: torch.device) -> MachineWeight:  # noqa: D102
        weight: MachineWeight = self._module().lower(packed, device)
        return weight

    def refusal(self, packed: PackedWeight) -> str | None:  # noqa: D102
        reason: str | None = self._module().refusal(packed)
        return reason

    def implementation(self, values: torch.dtype) -> str:  # noqa: D102
        return f"triton.{self.module}"

    def check_isa(self, isa: str | None) -> str:  # noqa: D102
        if isa is not None:
            raise IsaError(
                f"level '{isa}' is one of CPUs; kernels on {self.device} are compiled for the GPU they run on"
            )
        return "compiled for this GPU"


_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (*_HALVES, torch.float32)

KERNELS: tuple[Kernel, ...] = (
    CpuKernel("bitmask", "cpu", "bitmask_linear", _HALVES, cpu.bitmask_kernel),
    CpuKernel("nm", "cpu", "bitmask_linear", _HALVES, cpu.bitmask_kernel),
    CpuKernel("sell", "cpu", "sell_linear", _HALVES, cpu.sell_kernel),
    CpuKernel("block", "cpu", "lanes_linear", _HALVES, cpu.lanes_kernel),
    CpuKernel("bf16x12", "cpu", "lanes_linear", (torch.bfloat16,), cpu.lanes_kernel),
    CpuKernel("int4", "cpu", "lanes_linear", _FLOATS, cpu.lanes_kernel),
    CpuKernel("ternary", "cpu", "lowbit_linear", _FLOATS, cpu.lowbit_kernel),
    CpuKernel("int8", "cpu", "lowbit_linear", _FLOATS, cpu.lowbit_kernel),
    TritonKernel("nm", "cuda", "nm_triton_linear", _HALVES, "nm"),
    TritonKernel("sell", "cuda", "sell_triton_linear", _HALVES, "sell"),
    TritonKernel("bitmask", "cuda", "sell_triton_linear", _HALVES, "sell"),
    TritonKernel("ternary", "cuda", "ternary_triton_linear", _FLOATS, "ternary"),
    TritonKernel("block", "cuda", "block_triton_linear", _HALVES, "block"),
)
_ROWS = {(k.format, k.device): k for k in KERNELS}


def rows(device: str) -> tuple[Kernel, ...]:
    """The rows of a torch device type."""
    return tuple(k for k in KERNELS if k.device == device)


def missing(format: str, device: str) -> str | None:
    """That there is no row of a format on a torch device type, in words; None if there is one."""
    return None if (format, device) in _ROWS else f"no {device} kernel for {format}"


def refusal(packed: PackedWeight, device: str) -> str | None:
    """Why no kernel of a torch device type runs a weight, in words; None if one does."""
    return missing(packed.format, device) or _ROWS[packed.format, device].refusal(packed)


def kernel(format: str, device: str = "cpu") -> Kernel:
    """The row of a format on a torch device type; OptionError lists the rows there are."""
    row = _ROWS.get((format, device))
    if row is None:
        have = ", ".join(f"{k.format} on {k.device}" for k in KERNELS)
        raise OptionError(f"no kernel for format '{format}' on device '{device}'; there are: {have}")
    return row


def select(format: str, device: str, values: torch.dtype, isa: str | None = None) -> tuple[Kernel, str]:
    """The kernel for a format here, and why.

    Args:
        format: name of the format.
        device: torch device type.
        values: dtype of the stored values.
        isa: a CPU level to insist on; None for the active one.

    Raises:
        OptionError: no row of the table fits.
        IsaError: the machine lacks the level, or Triton.
    """
    row = kernel(format, device)
    if values not in row.values:
        raise OptionError(f"no {format} kernel for values of {values}; there are: {', '.join(map(str, row.values))}")
    why = row.check_isa(isa)
    row.function()  # loaded now: torch.compile cannot trace loading a library
    return row, f"{row.op} ({row.implementation(values)}): {why}"
