"""N:M weights on GPUs: N of every 16 columns (8:16, 6:16, 4:16; 2:4 and 4:8 are 8:16), values of 16, 8 or 4 bits.

Machine form: a thread owns a row and reads its values a *chunk* of 16 bytes at a time: `slots` = 8 bf16 or fp16
values, or 16 of int8 (8 of 6:16), and for each of them the position in its group of 16 columns, 4 bits; of int4, 16
(8) bytes of a code above its position. A
*supergroup* is the fewest groups whose values fill whole chunks: groups S, chunks C, with S * N = C * slots (8:16 in
bf16: 1 and 1; 6:16: 4 and 3). Rows are in tiles of 64, so that the threads of a warp read neighbouring memory and
gather x from the same 16 columns. Bits per stored weight: 20 in bf16, 12 in int8, 8 in int4; padding: N to 64 rows, K
to 8 supergroups.

Batch 1 and 2: every stored value gathers its x. Up to 64: the tile is decoded in registers and multiplied by
`tl.dot`. More (prefill): decompressed to a scratch shared by all layers, then torch's product. No atomics: parts
of K are summed in a second pass, in a fixed order. A row's result depends on the bucket its batch falls in.
"""

from __future__ import annotations

import math

import torch
import triton

from ...options import NM_PATTERNS
from ...packed import MachineWeight, PackedWeight
from . import nm_kernels
from .common import (
    TILE_ROWS,
    Launch,
    codes_of,
    in_parts,
    interpreted,
    join_halves,
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
    splits_for,
    value_bits,
)
from .tuning import launches

GROUP = 16  # columns that a position of 4 bits can number
PAD = 8  # supergroups: every launch's step divides it
MAX_GEMV, MAX_DOT = 2, 64

# By (kernel, largest batch of the bucket). `groups` of all but gemv is `dot_groups`.
LAUNCHES = {
    ("gemv", 1): Launch(groups=2, unroll=4, num_warps=4),
    ("gemv", 2): Launch(groups=2, unroll=2, num_warps=4),  # 4 spill on sm_90 in fp16
    ("dot", 16): Launch(groups=0, unroll=1, num_warps=4),
    ("dot", 32): Launch(groups=0, unroll=1, num_warps=4),
    ("dot", 64): Launch(groups=0, unroll=1, num_warps=4),
    ("decompress", 0): Launch(groups=0, unroll=1, num_warps=4),
}

# What tuning.py may try, by kernel: groups, unroll, warps. A loop's step divides what K is padded to.
GRID = {
    "gemv": ((1, 2, 4), (1, 2, 4, 8), (2, 4, 8)),
    "dot": ((0,), (1,), (4, 8)),
}
MOST_STEPS = PAD

# Instructions of the loop, by (kernel, batch, bits of values); tools/gpu_offline.py asserts them for sm_80, sm_90 and
# sm_100. Of gemv per stored weight, of dot per position: it decodes zeros too. An H200 issues about 7 per byte it
# reads: 17 per bf16 weight, 10 per int8 weight and 7 per int4 weight, or at 8:16 9, 5 and 4 per position: int4 saves
# memory, and takes longer than int8.
BUDGET = {
    ("gemv", 1, 16): 9.5, ("gemv", 2, 16): 16.0, ("gemv", 1, 8): 10.0, ("gemv", 2, 8): 16.0,
    ("gemv", 1, 4): 14.0, ("gemv", 2, 4): 20.5,
    ("dot", 16, 16): 14.0, ("dot", 32, 16): 14.5, ("dot", 64, 16): 17.0,
    ("dot", 16, 8): 14.0, ("dot", 32, 8): 14.5, ("dot", 64, 8): 17.0,
    ("dot", 16, 4): 16.5, ("dot", 32, 4): 17.0, ("dot", 64, 4): 20.0,
}  # fmt: skip


def dot_groups(groups: int) -> int:
    """Supergroups side by side where tiles are decoded: 64 columns, and at least one row for each of 128 threads."""
    return max(128 // TILE_ROWS, 4 // groups)


def slots_of(kept: int, bits: int) -> int:
    """Values of a chunk, for values of so many bits.

    16 bytes, but 8 bytes of 6:16 in int8 and int4, whose supergroup would not fit a thread's registers.
    """
    return 8 if kept == 6 or bits == 16 else 16


def gemv_unroll(chunks: int, setting: Launch, joined: bool) -> int:
    """Repeats in a GEMV's loop: none of supergroups that have several loads in flight, two of int4, or they spill."""
    return 1 if chunks > 1 else min(2, setting.unroll) if joined else setting.unroll


def geometry(kept: int, slots: int) -> tuple[int, int]:
    """Groups and chunks of a supergroup, for `kept` of 16 columns."""
    groups = slots // math.gcd(kept, slots)
    return groups, groups * kept // slots


def _layout(packed: PackedWeight) -> tuple[int, int, int, int]:
    """Columns kept of 16, slots of a chunk, groups and chunks of a supergroup."""
    few, of = NM_PATTERNS[packed.attributes["pattern"]]
    kept = few * GROUP // of
    slots = slots_of(kept, value_bits(packed))
    return kept, slots, *geometry(kept, slots)


def refusal(packed: PackedWeight) -> str | None:
    """Why no kernel here runs a weight, or None."""
    size, groups = packed.attributes.get("group_size"), _layout(packed)[2]
    wide = GROUP * groups * dot_groups(groups)
    if size and size < wide:
        return (
            f"{packed.format}: no GPU kernel for scales of {size} columns at {packed.attributes['pattern']}; "
            f"use a group_size of {wide} or more, or one scale per row"
        )
    return kept_only(packed)


def lower(packed: PackedWeight, device: torch.device) -> MachineWeight:
    """The machine form of canonical `nm`, made by torch where the tensors are.

    Returns:
        `values` [tiles, supergroups, C, 64, slots] of the values' dtype, for int4 int8 of 16 code + position;
        `positions` uint8 [tiles, supergroups, S, 32 N], which are [C, 64, slots] half bytes in values' order, the first
        in the low half, for int4 [tiles, supergroups, S, 0]; `scales` float32 [scale groups, 64 tiles], or [0, 0].

    Raises:
        WeightError: int8 activations, or scales of fewer columns than a kernel decodes at once.
    """
    require(refusal(packed))
    tensors = placed(packed, device)
    (n, k), bits = packed.shape, value_bits(packed)
    kept, slots, groups, chunks = _layout(packed)
    tiles, supers = -(-n // TILE_ROWS), -(-k // (GROUP * groups))
    supers += -supers % PAD
    columns = supers * groups * GROUP
    scales = _lower_scales(tensors, tiles)

    stored = torch.nn.functional.pad(mask_bits(tensors["mask"], k), (0, columns - k))
    values = codes_of(packed, tensors, int(stored.sum()))
    dense = values.new_zeros(n, columns)
    dense[stored] = values
    grouped = stored.view(n, supers * groups, GROUP)
    # Stable: stored columns first, in their order. A last, partial group fills up with columns that hold zeros.
    order = grouped.logical_not().to(torch.uint8).sort(dim=2, stable=True).indices[..., :kept]
    picked = dense.view(grouped.shape).gather(2, order)
    order = order.to(torch.uint8)

    def tiled(rows: torch.Tensor) -> torch.Tensor:
        rows = torch.nn.functional.pad(rows.reshape(n, -1), (0, 0, 0, tiles * TILE_ROWS - n))
        return rows.view(tiles, TILE_ROWS, supers, chunks, slots).permute(0, 2, 3, 1, 4).contiguous()

    if bits == 4:
        joined = (picked << 4) | order.to(torch.int8)
        machine = {"values": tiled(joined), "positions": order.new_zeros(tiles, supers, groups, 0)}
    else:
        joined = join_halves(tiled(order))
        machine = {"values": tiled(picked), "positions": joined.view(tiles, supers, groups, TILE_ROWS * kept // 2)}
    machine["scales"] = scales
    reserve(values.device, n * k)
    return MachineWeight(packed.format, packed.shape, packed.dtype, machine, "cuda")


def _lower_scales(tensors: dict[str, torch.Tensor], tiles: int) -> torch.Tensor:
    if "scales" not in tensors:
        return tensors["values"].new_zeros(0, 0, dtype=torch.float32)
    scales = tensors["scales"]
    padded = torch.nn.functional.pad(scales, (0, 0, 0, tiles * TILE_ROWS - scales.shape[0]))
    return padded.T.contiguous()


def naive_unpack(values: torch.Tensor, positions: torch.Tensor, scales: torch.Tensor, k: int) -> torch.Tensor:
    """The dense weight [64 tiles, K] float32 that a machine form stands for: what every kernel here computes with."""
    tiles, supers, chunks, rows, slots = values.shape
    groups = positions.shape[2]
    if positions.numel():
        halves = positions.view(tiles, supers, chunks, rows, slots // 2)
        order = torch.stack((halves & 15, halves >> 4), dim=-1).flatten(-2)
    else:
        order, values = values & 15, values >> 4

    def by_group(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.permute(0, 3, 1, 2, 4).reshape(tiles * rows, supers * groups, -1)

    dense = torch.zeros(tiles * rows, supers * groups, GROUP, device=values.device)
    dense.scatter_add_(2, by_group(order).long(), by_group(values).float())
    dense = dense.flatten(1)[:, :k]
    if scales.numel():
        size = scale_group(scales, k) or max(k, 1)
        dense = dense * scales.T.repeat_interleave(size, dim=1)[:, :k]
    return dense


def linear(
    x: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """y [..., N] in x's dtype from x [..., K] and the tensors of `lower`; accumulated in float32."""
    k, n = x.shape[-1], out_features
    tiles, supers = values.shape[:2]

    def multiply(x2: torch.Tensor, y: torch.Tensor) -> None:
        m = x2.shape[0]
        gemv = m <= MAX_GEMV
        bucket = ("gemv", m) if gemv else ("dot", max(16, triton.next_power_of_2(m)))
        constants = _constants(values, positions, scales, k, launches(x.device, "nm")[bucket], not gemv)
        if gemv:
            group_bytes = GROUP * x.element_size()
            constants["ALIGNED"] = x2.data_ptr() % group_bytes == 0 and (m == 1 or x2.stride(0) % GROUP == 0)
        else:
            # The interpreter's dot multiplies the bit patterns of bfloat16.
            unfit = interpreted() and x.dtype == torch.bfloat16
            constants["SAME"] = values.dtype in (x.dtype, torch.int8) and not unfit
        splits = splits_for(tiles, supers // (constants["GROUPS"] * constants["UNROLL"]))

        def run(bias: torch.Tensor | None, out: torch.Tensor) -> None:
            launch(
                nm_kernels.gemv if gemv else nm_kernels.dot, (tiles, splits), x2, values, _words(positions),
                scales, bias, out, m, n, k, x2.stride(0), supers, scales.shape[1], splits, BATCH=bucket[1], **constants,
            )  # fmt: skip

        in_parts(splits, y, bias, run)

    return product(x, bias, n, MAX_DOT, lambda dense: decompress(dense, values, positions, scales), multiply)


def decompress(
    dense: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """Fill dense [N, K] with the weight, rounded once to dense's dtype."""
    (n, k), (tiles, supers) = dense.shape, values.shape[:2]
    constants = _constants(values, positions, scales, k, launches(dense.device, "nm")["decompress", 0], True)
    grid = (tiles, supers // constants["GROUPS"])
    if k:
        words, stride = _words(positions), scales.shape[1]
        launch(nm_kernels.decompress, grid, dense, values, words, scales, n, k, supers, stride, **constants)
    return dense


def _words(positions: torch.Tensor) -> torch.Tensor:
    return positions.view(torch.int32) if positions.numel() else positions


def _constants(
    values: torch.Tensor, positions: torch.Tensor, scales: torch.Tensor, k: int, setting: Launch, dot: bool
) -> dict[str, int]:
    supers, chunks, rows, slots = values.shape[1:]
    super_groups = positions.shape[2]
    side_by_side = dot_groups(super_groups) if dot else setting.groups
    return {
        "KEPT": chunks * slots // super_groups, "SUPER": super_groups, "CHUNKS": chunks, "SLOTS": slots, "ROWS": rows,
        "GROUPS": side_by_side, "UNROLL": 1 if dot else gemv_unroll(chunks, setting, not positions.numel()),
        "MASK_K": supers * super_groups * GROUP != k,
        "SCALED": scaling(scales, k), "JOINED": positions.numel() == 0,
        "num_warps": setting.num_warps, "num_stages": 1,
    }  # fmt: skip


def _fake(
    x: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


register(
    "nm_triton_linear(Tensor x, Tensor values, Tensor positions, Tensor scales, Tensor? bias, SymInt out_features)"
    " -> Tensor",
    linear,
    _fake,
)
