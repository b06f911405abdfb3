"""What a format is. A new one is a file beside this one and a row in kernels/registry.py."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..errors import WeightError
from ..options import Options
from ..packed import MachineWeight, PackedWeight

# Called as torch.empty: (shape, dtype=...).
Empty = Callable[..., torch.Tensor]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of a canonical form.

    Attributes:
        name: its suffix in a compiled checkpoint, `<module>.<format>.<name>`.
        dtype: None for the dtype of the values.
        dims: number of dimensions.
        shape: the shape in words, for documentation and errors.
    """

    name: str
    dtype: torch.dtype | None
    dims: int
    shape: str


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to hold one weight, for the plan to choose from.

    Attributes:
        nbytes: of the canonical form.
        pack: makes it.
        values: kind of values its kernel reads, as compiler/cost.py names them.
        stored: values its kernel reads; what is not stored costs no multiplication.
    """

    nbytes: int
    pack: Callable[[], PackedWeight]
    values: str
    stored: int


class Format(abc.ABC):
    """A way to store a weight [N, K].

    Subclasses are stateless; everything about one weight is in its PackedWeight.
    """

    name: ClassVar[str]
    tensors: ClassVar[tuple[TensorSpec, ...]]
    dtypes: ClassVar[tuple[torch.dtype, ...]]

    def specs(self, attributes: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
        """The tensors of a weight with these attributes; `tensors` unless they matter."""
        return self.tensors

    @abc.abstractmethod
    def candidates(self, weight: torch.Tensor, nnz: int, options: Options) -> list[Candidate]:
        """How this format would hold this weight (of one of `dtypes`): exactly, or rounded as options.values asks."""

    @abc.abstractmethod
    def pack(self, weight: torch.Tensor, options: Options) -> PackedWeight:
        """Pack [N, K]; WeightError for NaN, Inf or a dtype not in `dtypes`."""

    def nnz(
        self, shape: tuple[int, int], shapes: Mapping[str, tuple[int, ...]], attributes: Mapping[str, Any]
    ) -> int | None:
        """Weights of [N, K] that are stored, as its tensors' shapes and its attributes tell; None if they do not."""
        return None

    def round(self, weight: torch.Tensor, options: Options) -> torch.Tensor:
        """The nearest weight this format holds exactly, as dense [N, K]; the same weight if lossless."""
        return weight

    @abc.abstractmethod
    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        """The dense [N, K]."""

    @abc.abstractmethod
    def lower(self, packed: PackedWeight) -> MachineWeight:
        """The machine form for this machine's kernels; shares no memory with `packed`, which may lie in a file."""

    @abc.abstractmethod
    def shard(self, packed: PackedWeight, dim: int, index: int, count: int) -> PackedWeight:
        """Part `index` of `count` along `dim`, without leaving the canonical form's meaning."""

    def join(self, parts: Sequence[PackedWeight], empty: Empty = torch.empty) -> PackedWeight | None:
        """Weights [N_i, K] as one [sum of N_i, K], without making them dense; None where their forms do not fit.

        An engine merges projections of one input (q, k and v) into one layer. `empty` gives the memory.
        """
        first = parts[0]
        if len(parts) == 1:
            return first
        if any((p.attributes, p.dtype, p.shape[1]) != (first.attributes, first.dtype, first.shape[1]) for p in parts):
            return None
        tensors = {name: stack([p.tensors[name] for p in parts], empty) for name in first.tensors}
        shape = (sum(p.shape[0] for p in parts), first.shape[1])
        return PackedWeight(self.name, shape, first.dtype, tensors, dict(first.attributes))

    def validate(self, packed: PackedWeight) -> None:
        """WeightError unless the tensors are those of this format, with its dtypes."""
        specs = self.specs(packed.attributes)
        expected = [spec.name for spec in specs]
        if sorted(packed.tensors) != sorted(expected):
            raise WeightError(f"{self.name}: needs tensors {expected}, got {sorted(packed.tensors)}")
        for spec in specs:
            tensor = packed.tensors[spec.name]
            dtype = spec.dtype or packed.dtype
            if tensor.dtype != dtype or tensor.dim() != spec.dims:
                raise WeightError(
                    f"{self.name}: tensor '{spec.name}' must be {dtype} of shape {spec.shape}, "
                    f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )

    def check_weight(self, weight: torch.Tensor) -> None:
        """WeightError for a dtype the format cannot store, or a device without kernels."""
        if weight.dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            raise WeightError(f"{self.name} stores {names}, got {weight.dtype}")
        if weight.device.type != "cpu":
            raise WeightError(f"{self.name} packs on the CPU; move the weight there first (it is on {weight.device})")

    @staticmethod
    def part(size: int, index: int, count: int) -> slice:
        """The slice of part `index` of `count`; WeightError unless it divides."""
        if count < 1 or not 0 <= index < count or size % count:
            raise WeightError(f"cannot cut {size} into {count} equal parts (part {index})")
        step = size // count
        return slice(index * step, (index + 1) * step)


def stack(tensors: Sequence[torch.Tensor], empty: Empty = torch.empty) -> torch.Tensor:
    """Tensors [N_i, ...] as one [sum of N_i, ...]; copied by all threads, as torch.cat does not."""
    first = tensors[0]
    out = empty((sum(t.shape[0] for t in tensors), *first.shape[1:]), dtype=first.dtype)
    for part, tensor in zip(torch.split(out, [t.shape[0] for t in tensors]), tensors, strict=True):
        part.copy_(tensor)
    return out


def naive_linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The reference for every format and kernel: unpack, multiply in float64, round once.

    Args:
        x: [..., K]; packed: [N, K]; bias: [N] or None.

    Returns:
        [..., N] float64; the caller rounds to the dtype it compares in.
    """
    y = x.double() @ packed.unpack().double().T
    return y if bias is None else y + bias.double()
