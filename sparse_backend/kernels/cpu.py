"""Loads the C++ library, chooses its instruction-set level, registers the ops' fakes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import envs
from ..errors import IsaError, WeightError
from . import layers

ISA_LEVELS = ("scalar", "avx2", "avx512", "amx")
_FEATURES = ("avx2", "avx512", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
_DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Ops are registered and SPARSE_BACKEND_ISA is applied on first use.

    Raises:
        IsaError: the library was not built, or SPARSE_BACKEND_ISA asks for too much.
    """
    path = Path(__file__).parents[1] / "_C.so"
    if not path.exists():
        raise IsaError(
            f"{path.name} is missing from the package: install it with 'pip install .' (needs a C++ compiler)"
        )
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise IsaError(
            f"{path.name} does not load beside torch {torch.__version__} (2.10 or later is needed): {error}"
        ) from None
    lib.sparse_backend_bitmask_kernel.restype = ctypes.c_char_p
    lib.sparse_backend_sell_kernel.restype = ctypes.c_char_p
    lib.sparse_backend_lanes_kernel.restype = ctypes.c_char_p
    lib.sparse_backend_lowbit_kernel.restype = ctypes.c_char_p
    forced = envs.isa()
    if forced is not None:  # first: a failed call must leave nothing that a second one trips over
        _set_level(lib, forced, f"{envs.ISA_VARIABLE}={forced}")
    _register_fakes()
    layers.register_fakes()
    return lib


def _set_level(lib: ctypes.CDLL, isa: str, asked: str) -> None:
    best = ISA_LEVELS[lib.sparse_backend_best_isa()]
    if isa not in ISA_LEVELS:
        raise IsaError(f"{asked}: unknown level; allowed here: {', '.join(available_levels(best))}")
    if not lib.sparse_backend_set_isa(ISA_LEVELS.index(isa)):
        raise IsaError(
            f"{asked}: this machine has no {isa}; allowed here: {', '.join(available_levels(best))} "
            "('sparse-backend doctor' shows why)"
        )


def available_levels(best: str | None = None) -> tuple[str, ...]:
    """The levels this machine runs, lowest first."""
    best = best or ISA_LEVELS[library().sparse_backend_best_isa()]
    return ISA_LEVELS[: ISA_LEVELS.index(best) + 1]


def active_isa() -> str:
    """The level in use."""
    return ISA_LEVELS[library().sparse_backend_active_isa()]


def set_isa(isa: str) -> None:
    """Use a level from now on, in this process; IsaError if the machine lacks it."""
    _set_level(library(), isa, f"set_isa({isa!r})")


@contextlib.contextmanager
def forced_isa(isa: str) -> Iterator[None]:
    """Use a level inside a with block."""
    before = active_isa()
    set_isa(isa)
    try:
        yield
    finally:
        set_isa(before)


def features() -> dict[str, bool]:
    """Instruction sets found by CPUID and enabled by the operating system (XCR0)."""
    bits = library().sparse_backend_cpu_features()
    return {name: bool(bits >> i & 1) for i, name in enumerate(_FEATURES)}


def bitmask_kernel(values: torch.dtype) -> str:
    """The bitmask kernel that runs for values and activations of this dtype at the active level."""
    name: bytes = library().sparse_backend_bitmask_kernel(_DTYPE_CODES[values], _DTYPE_CODES[values])
    return name.decode()


def sell_kernel(values: torch.dtype) -> str:
    """The sell kernel that runs for values of this dtype at the active level."""
    name: bytes = library().sparse_backend_sell_kernel(_DTYPE_CODES[values], _DTYPE_CODES[values])
    return name.decode()


def lanes_kernel(values: torch.dtype) -> str:
    """The kernel that runs dense low-bit and blocked weights for values and activations of this dtype."""
    name: bytes = library().sparse_backend_lanes_kernel(_DTYPE_CODES[values], _DTYPE_CODES[values])
    return name.decode()


def lowbit_kernel(values: torch.dtype) -> str:
    """The kernel that runs ternary and int8 weights at the active level, whatever the dtypes."""
    name: bytes = library().sparse_backend_lowbit_kernel()
    return name.decode()


def ops() -> Any:
    """`torch.ops.sparse_backend`, with the library loaded."""
    library()
    return torch.ops.sparse_backend


@contextlib.contextmanager
def as_weight_error() -> Iterator[None]:
    """Turn an op's complaint about a weight into WeightError, without torch's stack."""
    try:
        yield
    except RuntimeError as error:
        text = re.sub(r"\n?(Exception raised from|C\+\+ CapturedTraceback).*", "", str(error), flags=re.DOTALL)
        raise WeightError(re.sub(r"^\w+, \S+\.cpp:\d+, ", "", text.strip())) from None


def _register_fakes() -> None:
    """Shapes for torch.compile and the meta device."""

    @torch.library.register_fake("sparse_backend::bitmask_pack")  # type: ignore[untyped-decorator]
    def _pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nnz = torch.library.get_ctx().new_dynamic_size()
        n, k = weight.shape
        return weight.new_empty((n, (k + 7) // 8), dtype=torch.uint8), weight.new_empty((nnz,))

    @torch.library.register_fake("sparse_backend::count_nonzero")  # type: ignore[untyped-decorator]
    def _count(weight: torch.Tensor) -> int:
        raise NotImplementedError("how many weights are zero depends on their data")

    @torch.library.register_fake("sparse_backend::bitmask_unpack")  # type: ignore[untyped-decorator]
    def _unpack(mask: torch.Tensor, values: torch.Tensor, in_features: int) -> torch.Tensor:
        return values.new_empty((mask.shape[0], in_features))

    @torch.library.register_fake("sparse_backend::sell_lower")  # type: ignore[untyped-decorator]
    @torch.library.register_fake("sparse_backend::lanes_lower")  # type: ignore[untyped-decorator]
    @torch.library.register_fake("sparse_backend::bitmask_lower")  # type: ignore[untyped-decorator]
    def _lower(
        mask: torch.Tensor,
        values: torch.Tensor,
        scales: torch.Tensor | None,
        in_features: int,
        bits: int,
        group_size: int,
        activation_bits: int,
    ) -> torch.Tensor:
        return mask.new_empty((torch.library.get_ctx().new_dynamic_size(),))  # padding and escapes depend on data

    @torch.library.register_fake("sparse_backend::bf16x12_lower")  # type: ignore[untyped-decorator]
    def _lower12(low: torch.Tensor, high: torch.Tensor, exponents: torch.Tensor, escapes: torch.Tensor) -> torch.Tensor:
        return low.new_empty((torch.library.get_ctx().new_dynamic_size(),))  # the list of escapes

    @torch.library.register_fake("sparse_backend::join_halves")  # type: ignore[untyped-decorator]
    def _join_halves(codes: torch.Tensor) -> torch.Tensor:
        return codes.new_empty((codes.shape[0], (codes.shape[1] + 1) // 2), dtype=torch.uint8)

    @torch.library.register_fake("sparse_backend::split_halves")  # type: ignore[untyped-decorator]
    def _split_halves(halves: torch.Tensor, columns: int) -> torch.Tensor:
        return halves.new_empty((halves.shape[0], columns), dtype=torch.int8)

    @torch.library.register_fake("sparse_backend::bf16x12_encode")  # type: ignore[untyped-decorator]
    def _encode12(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        escapes = torch.library.get_ctx().new_dynamic_size()
        (n, k), byte = weight.shape, torch.uint8
        low, high = weight.new_empty((n, k), dtype=byte), weight.new_empty((n, (k + 1) // 2), dtype=byte)
        return low, high, weight.new_empty(16, dtype=byte), weight.new_empty((escapes, 3), dtype=torch.int32)

    @torch.library.register_fake("sparse_backend::bf16x12_decode")  # type: ignore[untyped-decorator]
    def _decode12(
        low: torch.Tensor, high: torch.Tensor, exponents: torch.Tensor, escapes: torch.Tensor
    ) -> torch.Tensor:
        return low.new_empty(low.shape, dtype=torch.bfloat16)

    @torch.library.register_fake("sparse_backend::ternary_scan")  # type: ignore[untyped-decorator]
    def _scan(weight: torch.Tensor, group_size: int) -> tuple[bool, torch.Tensor, torch.Tensor]:
        raise NotImplementedError("whether a weight is ternary depends on its data")

    @torch.library.register_fake("sparse_backend::ternary_encode")  # type: ignore[untyped-decorator]
    def _encode(codes: torch.Tensor, per_byte: int) -> torch.Tensor:
        return codes.new_empty((codes.shape[0], (codes.shape[1] + per_byte - 1) // per_byte), dtype=torch.uint8)

    @torch.library.register_fake("sparse_backend::ternary_decode")  # type: ignore[untyped-decorator]
    def _decode(packed: torch.Tensor, per_byte: int, in_features: int) -> torch.Tensor:
        return packed.new_empty((packed.shape[0], in_features), dtype=torch.int8)

    @torch.library.register_fake("sparse_backend::lowbit_lower")  # type: ignore[untyped-decorator]
    def _lowbit_lower(weights: torch.Tensor, per_byte: int, group_size: int, limbs: int) -> torch.Tensor:
        # The same sum as make_plan() in csrc/lowbit/layout.h; opcheck compares them.
        n, k = weights.shape
        block = 5 * (32 if group_size else 4)
        trits = k // block * block if per_byte == 5 else 0
        rest = 0 if per_byte == 1 else k - trits
        lines = trits // 20 + rest // 16 + ((k + 3) // 4 if per_byte == 1 else 0)
        panel = 64 * lines + 16 * ((rest % 16 + 3) // 4)
        return weights.new_empty((64 + (n + 15) // 16 * panel,), dtype=torch.uint8)

    @torch.library.register_fake("sparse_backend::lowbit_linear")  # type: ignore[untyped-decorator]
    def _lowbit_linear(
        x: torch.Tensor,
        packed: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        out_features: int,
        absmax: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], out_features))

    @torch.library.register_fake("sparse_backend::sell_linear")  # type: ignore[untyped-decorator]
    @torch.library.register_fake("sparse_backend::lanes_linear")  # type: ignore[untyped-decorator]
    @torch.library.register_fake("sparse_backend::bitmask_linear")  # type: ignore[untyped-decorator]
    def _linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], out_features))
