"""Compiled weights that reach an engine's layer as they are stored.

An engine's loader gets one tensor per HF module and renames, cuts and merges it with its own code. From a
compiled checkpoint that tensor is a `PackedTensor`: it says its shape and dtype, and only becomes dense if
somebody looks at it. Where all parts of a layer arrive untouched, their canonical forms are joined and
lowered; where an engine cuts them (tensor parallelism) or changes them, it works on dense weights as ever.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import mmap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..compiler import plan
from ..formats import get_format
from ..formats.base import Empty
from ..kernels import registry
from ..options import Options
from ..packed import PackedWeight

_CPU = torch.device("cpu")


class PackedTensor(torch.Tensor):
    """The dense weight [N, K] of one compiled module, made when an operation needs it.

    Attributes:
        module: HF name.
        packed: the canonical form.
    """

    module: str
    packed: PackedWeight
    _unpack: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(cls, module: str, packed: PackedWeight, unpack: Callable[[], torch.Tensor]) -> PackedTensor:
        """`unpack` makes the dense weight, with errors that name the file."""
        made = torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=packed.dtype, device=torch.device("cpu"))
        made.module, made.packed, made._unpack = module, packed, unpack
        result: PackedTensor = made
        return result

    def dense(self) -> torch.Tensor:
        """The weight as an ordinary tensor, made anew by every call."""
        return self._unpack()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Without the contents."""
        return f"PackedTensor({self.module}, {self.packed.format}, {tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Any operation runs on the dense weight."""
        args, kwargs = pytree.tree_map_only(PackedTensor, PackedTensor.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def release(tensors: Iterable[PackedTensor]) -> None:
    """Give back the memory of weights that were read from a mapped file, and are not needed any more.

    A mapping's pages count as this process's memory until it is closed, which engines do when a shard is done: half
    a gigabyte beside what was made of it. Who looks at such a tensor again reads it from the file again.
    """
    mapped = _mapped_files()
    for tensor in tensors:
        for part in tensor.packed.tensors.values():
            begin, end = part.data_ptr(), part.data_ptr() + part.nbytes
            # Of memory that no file stands behind, this would be the only copy.
            if any(first <= begin and end <= last for first, last in mapped):
                begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
                if begin < end:
                    _madvise(begin, end - begin, mmap.MADV_DONTNEED)


_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _mapped_files() -> list[tuple[int, int]]:
    """Where files lie in memory just now; nothing where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    # address range, rights, offset, device, inode, path
    fields = [line.split(maxsplit=5) for line in lines if "/" in line]
    ranges = [f[0].partition("-") for f in fields if f[4] != "0"]
    return [(int(first, 16), int(last, 16)) for first, _, last in ranges]


class Scratch:
    """Memory for joined parts, the same for every layer: pages from the system take longer than the copy."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def reset(self) -> None:
        """What was given out is not used any more."""
        if self._used > self._buffer.numel():
            self._buffer = torch.empty(self._used, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As torch.empty; from the buffer as far as it reaches."""
        nbytes = math.prod(shape) * dtype.itemsize
        start = self._used
        self._used += -(-nbytes // 64) * 64
        if self._used > self._buffer.numel() or not nbytes:
            return torch.empty(shape, dtype=dtype)
        return self._buffer[start : start + nbytes].view(dtype).view(shape)


def join(
    tensors: Sequence[PackedTensor],
    parts: Sequence[tuple[str, int]],
    in_features: int,
    dtype: torch.dtype,
    options: Options,
    empty: Empty = torch.empty,
    device: torch.device = _CPU,
) -> PackedWeight | None:
    """What a layer of `parts` holds, if `tensors` are these parts and whole, and kernels run it there; else None.

    Args:
        tensors: what arrived at the layer.
        parts: (HF module, output features) in the layer's order, as on this rank.
        in_features: of the layer, on this rank.
        dtype: the engine's.
        options: of the layer; a format that it names and `activations` are obeyed.
        empty: gives the memory.
        device: of the layer.
    """
    by_name = {t.module: t.packed for t in tensors}
    if len(by_name) != len(tensors) or set(by_name) != {name for name, _ in parts}:
        return None
    packed = [by_name[name] for name, _ in parts]
    form = packed[0].format
    if any(p.format != form or p.shape != (n, in_features) for p, (_, n) in zip(packed, parts, strict=True)):
        return None
    # Ternary kernels take scales that are finer than the engine's dtype.
    if options.format not in ("auto", form) or not (packed[0].dtype == dtype or form == "ternary"):
        return None
    joined = get_format(form).join(packed, empty)
    if joined is None:
        return None
    if options.activations is not None and "activations" in joined.attributes:
        joined = dataclasses.replace(joined, attributes={**joined.attributes, "activations": options.activations})
    if registry.refusal(joined, device.type) is not None:
        return None
    return plan.reconsider(joined, options, device=device)
