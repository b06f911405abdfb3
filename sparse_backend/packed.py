"""A weight in canonical form (portable) and in machine form (what a kernel reads)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .formats.base import Format


@dataclasses.dataclass(frozen=True)
class MachineWeight:
    """The machine form: everything a layer keeps.

    Attributes:
        format: name of the format.
        shape: (N, K) of the weight it stands for.
        dtype: dtype of the stored values.
        tensors: the kernel's tensors, in the order its op takes them.
        device: torch device type whose kernels read it. Not where the tensors lie: Triton's interpreter runs
            kernels of `cuda` on tensors of the CPU.
    """

    format: str
    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: dict[str, torch.Tensor]
    device: str = "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())


@dataclasses.dataclass
class PackedWeight:
    """The canonical form: the same bytes on every machine, what a compiled checkpoint stores.

    Attributes:
        format: name of the format.
        shape: (N, K), out_features and in_features.
        dtype: dtype of the stored values.
        tensors: the form's tensors by name, as the format's specification lists them.
        attributes: what a format must know besides its tensors, as JSON values (bits, group_size, ...).
    """

    format: str
    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: dict[str, torch.Tensor]
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    _machine: dict[str, MachineWeight] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._format().validate(self)

    def _format(self) -> Format:
        from .formats import get_format

        return get_format(self.format)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor of the form, metadata included."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / (N * K); 0 for an empty weight."""
        count = self.shape[0] * self.shape[1]
        return 8 * self.nbytes / count if count else 0.0

    def unpack(self) -> torch.Tensor:
        """The dense weight [N, K], bit-identical to what was packed (but +0.0 for -0.0)."""
        return self._format().unpack(self)

    def lower(self, device: str = "cpu", isa: str | None = None) -> MachineWeight:
        """The machine form, made once and cached.

        Args:
            device: a torch device: `cpu`, `cuda`, `cuda:1`. With TRITON_INTERPRET=1, `cuda` leaves tensors
                where they are.
            isa: kernel level to lower for; None for the active one. Today's CPU layout is
                the same at every level, so this only checks that the machine has it.

        Raises:
            IsaError: this machine lacks the level, or Triton.
            OptionError: no kernels for the device.
        """
        from .kernels import registry

        target = torch.device(device)
        row, _ = registry.select(self.format, target.type, self.dtype, isa)
        if device not in self._machine:
            self._machine[device] = row.lower(self, target)
        return self._machine[device]

    def shard(self, dim: int, index: int, count: int) -> PackedWeight:
        """Part `index` of `count` equal parts along N (dim 0) or K (dim 1), in canonical form.

        Raises:
            WeightError: the dimension does not divide by `count`.
        """
        return self._format().shard(self, dim, index, count)
