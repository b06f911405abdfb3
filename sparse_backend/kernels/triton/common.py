"""What the Triton families share: where tensors go, how ops are registered, launches, scratch, the last sum."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import IsaError, WeightError
from ...packed import PackedWeight

# Rows of a tile: two warps' worth of rows, and the height of one Hopper matrix instruction.
TILE_ROWS = 64
# Programs a split along K aims at: about eight per multiprocessor of an H200.
PROGRAMS = 1024
FINISH_BLOCK = 256
SCALE_GROUPS = (32, 64, 128, 256)
_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
_ops = torch.library.Library("sparse_backend", "FRAGMENT")
_scratch: dict[torch.device, torch.Tensor] = {}
# All scratch that was ever given out, by address: a captured CUDA graph writes to the one of its capture whenever it is
# replayed, also after a larger layer has brought a larger one.
_given_out: dict[int, torch.Tensor] = {}


@dataclasses.dataclass(frozen=True)
class Launch:
    """How one kernel is launched for one bucket of batch sizes.

    Attributes:
        groups: supergroups (or parts) a program works on side by side.
        unroll: how often its loop body repeats them: loads that are in flight together.
        num_warps: of one program.
    """

    groups: int
    unroll: int
    num_warps: int


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set before Triton was imported: kernels then run on tensors of the CPU."""
    return bool(triton.knobs.runtime.interpret)


def placed(packed: PackedWeight, device: torch.device) -> dict[str, torch.Tensor]:
    """The canonical tensors on the device; under the interpreter, where they are.

    Raises:
        IsaError: Triton is too old, or torch sees no GPU.
    """
    if _TRITON < (3, 6):
        raise IsaError(f"GPU kernels need Triton 3.6 or later, this is {triton.__version__}: pip install -U triton")
    if interpreted():
        return dict(packed.tensors)
    if not torch.cuda.is_available():
        raise IsaError(
            f"torch {torch.__version__} sees no GPU here; on one, install a CUDA or ROCm build of torch "
            "(to run kernels on the CPU for tests, set TRITON_INTERPRET=1 before Python starts)"
        )
    return {name: tensor.to(device) for name, tensor in packed.tensors.items()}


def kept_only(packed: PackedWeight) -> str | None:
    """Why kernels that keep activations cannot run a weight, or None."""
    if packed.attributes.get("activations", "keep") == "keep":
        return None
    return f"{packed.format}: no GPU kernel for int8 activations; pack with activations='keep'"


def require(refusal: str | None) -> None:
    """WeightError, unless there is no reason."""
    if refusal is not None:
        raise WeightError(refusal)


def value_bits(packed: PackedWeight) -> int:
    """Of a stored value."""
    return {"int8": 8, "int4": 4}.get(str(packed.attributes.get("values")), 16)


def codes_of(packed: PackedWeight, tensors: dict[str, torch.Tensor], stored: int) -> torch.Tensor:
    """The values [stored] of a form with masks where they are, int4 as int8."""
    values = tensors["values"]
    if packed.attributes.get("values") != "int4":
        return values
    return int4_codes(values)[:stored]


def int4_codes(stored: torch.Tensor) -> torch.Tensor:
    """int8 [..., 2 n] of two codes to a byte [..., n], the first in the low half."""
    return (torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2).to(torch.int8) ^ 8) - 8


def join_halves(values: torch.Tensor) -> torch.Tensor:
    """Integers below 16, or int4 codes, [..., 2 n] as bytes [..., n], the first in the low half."""
    halves = values.to(torch.uint8) & 15
    return halves[..., 0::2] | (halves[..., 1::2] << 4)


def mask_bits(mask: torch.Tensor, k: int) -> torch.Tensor:
    """bool [N, K] of a mask [N, ceil(K / 8)]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, :, None] >> shifts) & 1).flatten(1)[:, :k].bool()


def flat(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as [M, K] with columns side by side."""
    x2 = x.reshape(-1, x.shape[-1])
    return x2 if x2.stride(1) == 1 else x2.contiguous()


def dense_product(x2: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y [M, N] by torch from x [M, K] and a decompressed weight [N, K]."""
    return torch.nn.functional.linear(x2, weight, None if bias is None else bias.to(x2.dtype))


def scale_group(scales: torch.Tensor, k: int) -> int:
    """Columns per scale of scales [groups, N]; 0 for one scale per row."""
    count = scales.shape[0]
    return next((size for size in SCALE_GROUPS if -(-k // size) == count), 0) if count > 1 else 0


def scaling(scales: torch.Tensor, k: int) -> int:
    """The kernels' SCALED of scales [groups, N]: 0 for none, 1 for one per row, else columns per scale."""
    return 0 if not scales.numel() else scale_group(scales, k) or 1


def product(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    most: int,
    decompressed: Callable[[torch.Tensor], torch.Tensor],
    multiply: Callable[[torch.Tensor, torch.Tensor], Any],
) -> torch.Tensor:
    """y [..., N] in x's dtype from x [..., K]: what every family does around its kernels.

    Args:
        bias: [N] or None.
        most: tokens that its kernels multiply. More (prefill) are torch's product with the decompressed weight.
        decompressed: fills a scratch [N, K] of x's dtype with the weight.
        multiply: fills y [M, N] from x [M, K].
    """
    x2 = flat(x)
    y = x.new_empty(x2.shape[0], out_features)
    if x2.shape[0] > most and y.numel():
        y = dense_product(x2, decompressed(scratch(x, (out_features, x.shape[-1]))), bias)
    elif y.numel():
        multiply(x2, y)
    return y.view(*x.shape[:-1], out_features)


def in_parts(
    parts: int, y: torch.Tensor, bias: torch.Tensor | None, run: Callable[[torch.Tensor | None, torch.Tensor], None]
) -> None:
    """Fill y [M, N] by run(bias, out): out is y, or float32 [parts, M, N] without a bias, which are then summed."""
    if parts == 1:
        return run(bias, y)
    partial = y.new_empty(parts, *y.shape, dtype=torch.float32)
    run(None, partial)
    finish(partial, bias, y)


def register(schema: str, run: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]) -> None:
    """Register an op of `torch.ops.sparse_backend`, for GPUs and, for the interpreter, CPUs."""
    name = schema.split("(")[0]
    _ops.define(schema)
    _ops.impl(name, run, "CUDA")
    _ops.impl(name, run, "CPU")
    torch.library.register_fake(f"sparse_backend::{name}", fake)


def launch(kernel: Any, grid: tuple[int, ...], x: torch.Tensor, *args: Any, **constants: Any) -> None:
    """Run a kernel on x's device, which need not be torch's current one.

    Products and sums fuse, as instruction counts assume; Triton 3.10 stops doing so by default.
    """
    other = x.is_cuda and x.device.index != torch.cuda.current_device()
    with torch.cuda.device(x.device) if other else contextlib.nullcontext():
        kernel[grid](x, *args, **{"enable_fp_fusion": True, **constants})


def splits_for(tiles: int, steps: int) -> int:
    """Into how many parts a weight's K is split: enough programs for the GPU, none without work."""
    return max(1, min(-(-PROGRAMS // max(1, tiles)), steps))


def reserve(device: torch.device, count: int) -> None:
    """Make the device's scratch hold `count` values of two bytes. Called as weights are lowered."""
    held = _scratch.get(device)
    if held is None or held.numel() < count:
        _scratch[device] = torch.empty(count, dtype=torch.int16, device=device)


def scratch(x: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Dense scratch of x's dtype, shared by all layers of a device: its contents last until the next layer.

    Layers lowered elsewhere (a state dict loaded, a module moved) may need more than was reserved; it then grows,
    which CUDA graphs allow in their warm-up runs and not under capture.
    """
    count = shape[0] * shape[1] * x.element_size() // 2
    if x.device not in _scratch or _scratch[x.device].numel() < count:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise IsaError(f"prefill scratch of {2 * count} bytes is not there yet: run once before capturing a graph")
        reserve(x.device, count)
    held = _scratch[x.device]
    _given_out[held.data_ptr()] = held
    return held[:count].view(x.dtype).view(shape)


def finish(partial: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """y [M, N] = the sum of partial [splits, M, N] float32, in a fixed order, + bias [N]."""
    splits, m, n = partial.shape
    grid = (triton.cdiv(n, FINISH_BLOCK), m)
    launch(_finish, grid, partial, bias, y, m, n, splits, BLOCK=FINISH_BLOCK, num_warps=4)


@triton.jit
def _finish(partial, bias, y, m, n, splits, BLOCK: tl.constexpr):
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = column < n
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(partial + (split * m + row).to(tl.int64) * n + column, mask=there, other=0.0)
    if bias is not None:
        total += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row.to(tl.int64) * n + column, total.to(y.dtype.element_ty), mask=there)


@triton.jit
def pick(tensor, index: tl.constexpr, COUNT: tl.constexpr):
    """Column `index` of an integer tensor [R, COUNT], as int32 [R].

    A thread holds its rows whole, so the compiler turns the sum over constants into the register's name.
    """
    chosen = tl.arange(0, COUNT)[None, :] == index
    return tl.sum(tl.where(chosen, tensor.to(tl.int32), 0), axis=1)


@triton.jit
def int4(bits):
    """The code in the lowest half byte of integers."""
    return ((bits & 15) ^ 8) - 8
