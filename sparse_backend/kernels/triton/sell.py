"""Arbitrary patterns on GPUs: the canonical forms `sell` and `bitmask`, values of 16, 8 or 4 bits.

Machine form: rows sorted by how much they store, cut into slices of 64 and padded to the longest of their slice
(SELL-C-sigma, Kreutzer et al., 2014, sigma = N). A thread owns a row and reads its values a *chunk* at a time, of
`slots` = 8 bf16 or fp16, or 16 int8 or int4, and one byte of position for each: columns after the last column of the
row's previous chunk. A column further away than 255 is reached by chunks that are filled up with zeros.

What it costs: 24 bits per bf16 weight stored, 16 per int8 weight, 12 per int4 weight, and the padding: half a chunk per
row and where columns are far apart (at 97% zeros and more). At 70% zeros that is 2.2 times less than dense bf16, at 90%
6.5.
`bitmask` weights, for which a GPU has no fast bitmap decoder, use it too: at 50% 1.5 bytes per position, 1.33 times
less than dense, where a bitmap would have 1.125. Padding such weights to N:M costs more: random zeros at 50% need
12:16, 1.9 bytes per position; those that fit 8:16 are `nm` already (formats/nm.py finds them).

Batch 1 and 2: every stored value gathers its x. Up to 64: it reads its row of the transposed x. More (prefill):
decompressed to a scratch shared by all layers, then torch's product. No atomics; K is cut into parts that are
summed in a second pass, in a fixed order. A row's result depends on the bucket its batch falls in.
"""

from __future__ import annotations

import torch

from ...packed import MachineWeight, PackedWeight
from . import sell_kernels
from .common import (
    PROGRAMS,
    TILE_ROWS,
    Launch,
    codes_of,
    in_parts,
    int4_codes,
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
    value_bits,
)
from .tuning import launches

MAX_GEMV, MAX_BATCH = 2, 64
_REACH = 255  # columns that one byte of position goes
_PART_CHUNKS = 4  # fewest chunks of a part: its start costs as much as one

# By (kernel, tokens of a program).
LAUNCHES = {
    ("gemv", 1): Launch(groups=1, unroll=4, num_warps=2),
    ("gemv", 2): Launch(groups=1, unroll=4, num_warps=2),
    ("batched", 16): Launch(groups=1, unroll=1, num_warps=4),
    ("decompress", 0): Launch(groups=1, unroll=1, num_warps=2),
}

# What tuning.py may try, by kernel: groups, unroll, warps. A thread owns a row of 64.
GRID = {"gemv": ((1,), (1, 2, 4, 8), (2,)), "batched": ((1,), (1,), (2, 4, 8))}
MOST_STEPS = 8

# Instructions of the loop per stored weight, by (kernel, tokens, bits of values); tools/gpu_offline.py asserts them for
# sm_80, sm_90 and sm_100. An H200 issues about 7 per byte it reads: 21 per bf16 weight, 14 per int8 weight, 10 per int4
# weight. Of `batched`, for 16 tokens.
BUDGET = {
    ("gemv", 1, 16): 9.5, ("gemv", 2, 16): 14.5, ("gemv", 1, 8): 9.0, ("gemv", 2, 8): 14.5,
    ("gemv", 1, 4): 12.0, ("gemv", 2, 4): 17.0,
    ("batched", 16, 16): 62.0, ("batched", 16, 8): 62.0, ("batched", 16, 4): 64.0,
}  # fmt: skip
# What looking up a scale adds to every weight where groups of columns have their own.
SCALES_OF_GROUPS = {"gemv": 9.5, "batched": 17.0}


refusal = kept_only


def lower(packed: PackedWeight, device: torch.device) -> MachineWeight:
    """The machine form of canonical `sell` or `bitmask`, made by torch where the tensors are.

    Returns:
        `values` [chunks, 64, slots] of the values' dtype, int4 as int32 [.., slots / 8], the first of eight in the low
        half byte; `positions` uint8 [chunks, 64, slots]; `starts` int32 [parts, 64 slices], the column
        that a row's first position of a part counts from; `offsets` int32 [slices, parts + 1], a part's chunks;
        `rows` int32 [64 slices], rows of the weight in the order of storage, -1 for padding; `scales` float32
        [groups, 64 slices], or [0, 0].

    Raises:
        WeightError: int8 activations, for which there is no kernel.
    """
    require(refusal(packed))
    tensors = placed(packed, device)
    n, k = packed.shape
    stored, bits = mask_bits(tensors["mask"], k), value_bits(packed)
    values = codes_of(packed, tensors, int(stored.sum()))
    place = values.device
    positions, taken, bases, used = _chunks(stored, 8 if bits == 16 else 16)
    count = positions.shape[0]

    slices = -(-n // TILE_ROWS)
    padding = slices * TILE_ROWS - n
    order = used.sort(descending=True, stable=True).indices
    lengths = torch.nn.functional.pad(used[order], (0, padding)).view(slices, TILE_ROWS).amax(1)
    longest = int(lengths.max()) if n else 0
    parts = max(1, min(PROGRAMS // max(1, slices), longest // _PART_CHUNKS))
    cuts = lengths[:, None] * torch.arange(parts + 1, device=place) // parts
    begins = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))[:-1]

    def sliced(tensor: torch.Tensor) -> torch.Tensor:
        """[count, N, ...] in the order of storage, [slices, count, 64, ...]."""
        ordered = tensor[:, order]
        ordered = torch.cat([ordered, ordered.new_zeros(tensor.shape[0], padding, *tensor.shape[2:])], dim=1)
        return ordered.view(tensor.shape[0], slices, TILE_ROWS, *tensor.shape[2:]).transpose(0, 1)

    kept = torch.arange(count, device=place)[None, :] < lengths[:, None]
    # A taken slot holds the next value of the canonical form, whose rows lie one after the other.
    filled = torch.cat([values, values.new_zeros(1)])[taken]
    starts = sliced(bases).gather(1, cuts[:, :-1, None].expand(slices, parts, TILE_ROWS))
    rows = torch.cat([order, order.new_full((padding,), -1)])
    ordered = sliced(filled)[kept]
    machine = {
        "values": join_halves(ordered).view(torch.int32) if bits == 4 else ordered,
        "positions": sliced(positions)[kept],
        "starts": starts.transpose(0, 1).reshape(parts, -1).contiguous().int(),
        "offsets": (begins[:, None] + cuts).int(), "rows": rows.int(),
        "scales": values.new_zeros(0, 0, dtype=torch.float32),
    }  # fmt: skip
    if "scales" in tensors:
        machine["scales"] = torch.nn.functional.pad(tensors["scales"][order], (0, 0, 0, padding)).T.contiguous()
    reserve(place, n * k)
    return MachineWeight(packed.format, packed.shape, packed.dtype, machine, "cuda")


def _chunks(stored: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut the stored columns of bool [N, K] into chunks, all rows at once, chunk by chunk.

    Returns:
        positions uint8 [chunks, N, slots]; which value of the canonical form is in each slot, int64 [chunks, N, slots],
        -1 for none; the column each chunk counts from, int64 [chunks + 1, N]; chunks that each row uses, [N].
    """
    n, k = stored.shape
    each = stored.sum(1)
    ends = each.cumsum(0)
    columns = stored.nonzero()[:, 1]
    columns = torch.cat([columns, columns.new_full((slots,), k)])
    slot = torch.arange(slots, device=stored.device)
    at = ends - each
    base, used = torch.zeros_like(at), torch.zeros_like(at)
    positions, taken, bases = [], [], [base]
    while bool((at < ends).any()):
        index = at[:, None] + slot
        distance = columns[index.clamp(max=columns.numel() - 1)] - base[:, None]
        fits = (index < ends[:, None]) & (distance <= _REACH)
        more = (at + fits.sum(1) < ends)[:, None]  # of the row: a filler goes as far as it can
        position = torch.where(fits, distance, torch.where(more, _REACH, 0))
        positions.append(position.to(torch.uint8))
        taken.append(torch.where(fits, index, -1))
        used = used + (at < ends)
        at = at + fits.sum(1)
        base = base + position[:, -1]
        bases.append(base)
    if not positions:
        none = torch.zeros(0, n, slots, device=stored.device)
        return none.to(torch.uint8), none.long(), torch.stack(bases), used
    return torch.stack(positions), torch.stack(taken), torch.stack(bases), used


def naive_unpack(
    values: torch.Tensor,
    positions: torch.Tensor,
    starts: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    scales: torch.Tensor,
    shape: tuple[int, int],
) -> torch.Tensor:
    """The dense weight [N, K] float32 that a machine form stands for: what every kernel here computes with."""
    dense = torch.zeros(shape)
    if values.dtype == torch.int32:
        values = int4_codes(values.view(torch.uint8))
    for line, row in enumerate(rows.tolist()):
        piece, inside = divmod(line, TILE_ROWS)
        for part in range(starts.shape[0] if row >= 0 else 0):
            column = int(starts[part, line])
            for chunk in range(int(offsets[piece, part]), int(offsets[piece, part + 1])):
                where = column + positions[chunk, inside].long()
                dense[row].index_add_(0, where, values[chunk, inside].float())
                column = int(where[-1])
        if row >= 0 and scales.numel():
            dense[row] *= scales[:, line].repeat_interleave(scale_group(scales, shape[1]) or shape[1])[: shape[1]]
    return dense


def linear(
    x: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    starts: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """y [..., N] in x's dtype from x [..., K] and the tensors of `lower`; accumulated in float32."""
    tensors = (values, positions, starts, offsets, rows, scales)
    parts, lines = starts.shape

    def multiply(x2: torch.Tensor, y: torch.Tensor) -> None:
        m, n = y.shape
        if m <= MAX_GEMV:
            kernel, batch, blocks = sell_kernels.gemv, m, 1
            setting = launches(x.device, "sell")["gemv", m]
        else:
            kernel, batch, blocks = sell_kernels.batched, 16, -(-m // 16)
            x2 = torch.nn.functional.pad(x2, (0, 0, 0, -m % 16)).t().contiguous()
            setting = launches(x.device, "sell")["batched", 16]

        def run(bias: torch.Tensor | None, out: torch.Tensor) -> None:
            launch(
                kernel, (lines // TILE_ROWS, parts, blocks), x2, *tensors, bias, out, m, n, x2.stride(0), parts, lines,
                BATCH=batch, SLOTS=positions.shape[2], ROWS=TILE_ROWS, UNROLL=setting.unroll,
                SCALED=scaling(scales, x.shape[-1]), num_warps=setting.num_warps, num_stages=1,
            )  # fmt: skip

        in_parts(parts, y, bias, run)

    return product(x, bias, out_features, MAX_BATCH, lambda dense: decompress(dense, *tensors), multiply)


def decompress(
    dense: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    starts: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """Fill dense [N, K] with the weight, rounded once to dense's dtype."""
    setting = launches(dense.device, "sell")["decompress", 0]
    parts, lines = starts.shape
    launch(
        sell_kernels.decompress, (lines // TILE_ROWS, parts), dense.zero_(), values, positions, starts, offsets, rows,
        scales, dense.shape[1], parts, lines, SLOTS=positions.shape[2], ROWS=TILE_ROWS,
        SCALED=scaling(scales, dense.shape[1]), num_warps=setting.num_warps, num_stages=1,
    )  # fmt: skip
    return dense


def _fake(
    x: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    starts: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


register(
    "sell_triton_linear(Tensor x, Tensor values, Tensor positions, Tensor starts, Tensor offsets, Tensor rows, "
    "Tensor scales, Tensor? bias, SymInt out_features) -> Tensor",
    linear,
    _fake,
)
