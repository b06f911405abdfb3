"""Blocks of 16x16 on GPUs: values of 2 bytes, or int8 or int4 under scales; blocks of zeros are not stored.

Machine form: the canonical blocks, row by row as they are, and the block column of each (BSR). A *strip* is 16 rows of
the weight; a program works on one part of the blocks of one strip, several blocks at a time. Bits per stored weight:
16.1 in bf16, 8.1 in int8, 4.1 in int4; padding: N and K to 16, which the canonical form has too.

Batch 1 and 2: a thread multiplies 16 bytes of a row of a block by the x beside it. Up to 64: `tl.dot` of several
blocks side by side, tokens padded to 16; of one block at a time under scales of groups. More (prefill): decompressed
to a scratch shared by all layers, then torch's product. No atomics: parts are summed in a second pass, in a fixed
order. A row's result depends on the bucket its batch falls in.
"""

from __future__ import annotations

import torch
import triton

from ...packed import MachineWeight, PackedWeight
from . import block_kernels
from .common import (
    Launch,
    in_parts,
    int4_codes,
    interpreted,
    kept_only,
    launch,
    mask_bits,
    placed,
    product,
    register,
    require,
    reserve,
    scale_group,
    scaling,
    value_bits,
)
from .tuning import launches

SIZE = 16
MAX_GEMV, MAX_DOT = 2, 64
MOST_STORED = 2**31 - 1
PROGRAMS = 2048  # strips are flat: twice as many programs as tiles of 64 rows get

# By (kernel, tokens of a program); `groups` are blocks side by side.
LAUNCHES = {
    ("gemv", 1): Launch(groups=4, unroll=4, num_warps=4),
    ("gemv", 2): Launch(groups=4, unroll=4, num_warps=4),
    ("dot", 16): Launch(groups=8, unroll=1, num_warps=2),
    ("dot", 32): Launch(groups=8, unroll=1, num_warps=4),
    ("dot", 64): Launch(groups=8, unroll=1, num_warps=4),
    ("decompress", 0): Launch(groups=8, unroll=1, num_warps=4),
}

# What tuning.py may try, by kernel: groups, unroll, warps.
GRID = {
    "gemv": ((2, 4, 8), (1, 2, 4), (2, 4, 8)),
    "dot": ((4, 8, 16), (1,), (2, 4, 8)),
}
MOST_STEPS = 16

# Instructions of the loop per stored weight, by (kernel, batch); tools/gpu_offline.py asserts them for sm_80, sm_90 and
# sm_100. An H200 issues about 14 per bf16 weight in the time it reads one, 7 per int8 weight.
BUDGET = {("gemv", 1): 7.5, ("gemv", 2): 11.0}
# What scales of groups of columns add to every weight.
SCALES_OF_GROUPS = 2.0


def refusal(packed: PackedWeight) -> str | None:
    """Why no kernel here runs a weight, or None."""
    stored = packed.tensors["values"].shape[0] * SIZE * SIZE
    if stored > MOST_STORED:
        return "block: GPU kernels number weights in 32 bits, this one stores 2^31 or more"
    return kept_only(packed)


def lower(packed: PackedWeight, device: torch.device) -> MachineWeight:
    """The machine form of canonical `block`, made by torch where the tensors are.

    Returns:
        `values` [stored, 16, 16] of the values' dtype, int4 as int32 [stored, 16, 2], the first of eight in the low
        half byte; `columns` int32 [stored], the block column of each; `offsets`
        int32 [strips + 1], a strip's blocks; `scales` float32 [groups, 16 strips], or [0, 0].

    Raises:
        WeightError: int8 activations, or more weights than `MOST_STORED`: there is no kernel.
    """
    require(refusal(packed))
    tensors = placed(packed, device)
    n, k = packed.shape
    strips = -(-n // SIZE)
    occupied = mask_bits(tensors["blocks"], -(-k // SIZE))
    offsets = torch.nn.functional.pad(occupied.sum(1).cumsum(0), (1, 0)).int()
    scales = offsets.new_zeros(0, 0, dtype=torch.float32)
    if "scales" in tensors:
        stored = tensors["scales"]
        scales = torch.nn.functional.pad(stored, (0, 0, 0, strips * SIZE - n)).T.contiguous()
    values = tensors["values"]
    machine = {
        "values": values.view(torch.int32) if value_bits(packed) == 4 else values,
        "columns": occupied.nonzero()[:, 1].int().contiguous(), "offsets": offsets, "scales": scales,
    }  # fmt: skip
    reserve(offsets.device, n * k)
    return MachineWeight(packed.format, packed.shape, packed.dtype, machine, "cuda")


def naive_unpack(
    values: torch.Tensor, columns: torch.Tensor, offsets: torch.Tensor, scales: torch.Tensor, k: int
) -> torch.Tensor:
    """The dense weight [16 strips, K] float32 that a machine form stands for: what every kernel here computes with."""
    strips, across = offsets.shape[0] - 1, -(-k // SIZE)
    if values.dtype == torch.int32:
        values = int4_codes(values.view(torch.uint8))
    blocks = torch.zeros(strips, across, SIZE, SIZE)
    strip = torch.arange(strips).repeat_interleave(offsets.diff().long())
    blocks[strip, columns.long()] = values.float()
    dense = blocks.transpose(1, 2).reshape(strips * SIZE, across * SIZE)[:, :k]
    if scales.numel():
        dense = dense * scales.T.repeat_interleave(scale_group(scales, k) or max(k, 1), dim=1)[:, :k]
    return dense


def linear(
    x: torch.Tensor,
    values: torch.Tensor,
    columns: torch.Tensor,
    offsets: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """y [..., N] in x's dtype from x [..., K] and the tensors of `lower`; accumulated in float32."""
    k = x.shape[-1]
    strips = offsets.shape[0] - 1

    def multiply(x2: torch.Tensor, y: torch.Tensor) -> None:
        m, n = y.shape
        scaled = scaling(scales, k)
        form, batch = ("gemv", m) if m <= MAX_GEMV else ("dot", max(16, triton.next_power_of_2(m)))
        setting = launches(x.device, "block")[form, batch]
        if form == "gemv":
            kernel, step = block_kernels.gemv, setting.groups
            slots = 16 if values.dtype == torch.int8 else 8
            constants = {"SLOTS": slots, "UNROLL": setting.unroll}
        else:
            kernel, step = block_kernels.dot, 1 if scaled > 1 else setting.groups
            # The interpreter's dot multiplies the bit patterns of bfloat16.
            unfit = interpreted() and x.dtype == torch.bfloat16
            constants = {"SAME": values.dtype in (x.dtype, torch.int8, torch.int32) and not unfit}
        # From shapes alone: how many blocks a strip stores on average.
        splits = splits_for(strips, -(-values.shape[0] // (strips * step * setting.unroll)))

        def run(bias: torch.Tensor | None, out: torch.Tensor) -> None:
            launch(
                kernel, (strips, splits, 1), x2, values, columns, offsets, scales, bias, out,
                m, n, k, x2.stride(0), scales.shape[1], BATCH=batch, STEP=step, MASK_K=k % SIZE != 0, SCALED=scaled,
                num_warps=setting.num_warps, num_stages=1, **constants,
            )  # fmt: skip

        in_parts(splits, y, bias, run)

    def decompressed(dense: torch.Tensor) -> torch.Tensor:
        return decompress(dense, values, columns, offsets, scales)

    return product(x, bias, out_features, MAX_DOT, decompressed, multiply)


def splits_for(strips: int, steps: int) -> int:
    """Into how many parts the blocks of a strip are cut: enough programs for the GPU, none without work."""
    return max(1, min(-(-PROGRAMS // strips), steps))


def decompress_step(setting: Launch, int4: bool) -> int:
    """Blocks side by side of the kernel `decompress`: half as many of int4, which spill otherwise."""
    return setting.groups // 2 if int4 else setting.groups


def decompress(
    dense: torch.Tensor, values: torch.Tensor, columns: torch.Tensor, offsets: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """Fill dense [N, K] with the weight, rounded once to dense's dtype."""
    (n, k), strips, setting = dense.shape, offsets.shape[0] - 1, launches(dense.device, "block")["decompress", 0]
    step = decompress_step(setting, values.dtype == torch.int32)
    splits = splits_for(strips, -(-values.shape[0] // (strips * step)))
    launch(
        block_kernels.decompress, (strips, splits), dense.zero_(), values, columns, offsets, scales,
        n, k, scales.shape[1], STEP=step, SCALED=scaling(scales, k), num_warps=setting.num_warps,
    )  # fmt: skip
    return dense


def _fake(
    x: torch.Tensor,
    values: torch.Tensor,
    columns: torch.Tensor,
    offsets: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


register(
    "block_triton_linear(Tensor x, Tensor values, Tensor columns, Tensor offsets, Tensor scales, Tensor? bias, "
    "SymInt out_features) -> Tensor",
    linear,
    _fake,
)
