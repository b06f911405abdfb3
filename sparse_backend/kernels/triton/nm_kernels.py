"""Device code of N:M weights; the layout is that of nm.py, which launches these kernels.

Constants that all of them take: KEPT of 16 columns are stored; a supergroup has SUPER groups of 16 and CHUNKS chunks of
SLOTS values; a tile has ROWS rows; a program works on GROUPS supergroups side by side, UNROLL times per iteration.
JOINED: a byte of `values` holds an int4 code above its position; there are no `words`.
MASK_K: x is shorter than the padded columns. SCALED: 0 no scales, 1 one per row, else columns per scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import pick


@triton.jit
def _slot_positions(words, row, SLOTS: tl.constexpr):
    """Where each slot of chunk rows `row` [R] is in its group, int32 [R, SLOTS]."""
    shifts = tl.arange(0, 8) * 4
    if SLOTS == 8:
        found = tl.load(words + row)[:, None] >> shifts[None, :]
    else:
        pair = tl.load(words + row[:, None] * 2 + tl.arange(0, 2)[None, :])
        found = tl.reshape(pair[:, :, None] >> shifts[None, None, :], [row.shape[0], SLOTS])
    return found & 15


@triton.jit
def _gather(pointers, position, LOG: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to `position` < 16 after each of `pointers`; values have 1 << LOG bytes.

    ALIGNED: `pointers` end in zeros, so the position is or-ed in: one instruction, where adding to 64 bits takes two.
    """
    if ALIGNED:
        bits = pointers.to(tl.int64, bitcast=True) | (position << LOG).to(tl.int64)
        pointers = bits.to(pointers.dtype, bitcast=True)
    else:
        pointers += position
    return pointers


@triton.jit
def gemv(
    x, values, words, scales, bias, out,
    m, n, k, x_stride, supers, scale_stride, splits,
    BATCH: tl.constexpr, KEPT: tl.constexpr, SUPER: tl.constexpr, CHUNKS: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, UNROLL: tl.constexpr, MASK_K: tl.constexpr, SCALED: tl.constexpr,
    JOINED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of rows, one part of K: partial sums of 1 or 2 tokens. One row of GROUPS supergroups per thread."""
    tile, split = tl.program_id(0), tl.program_id(1)
    steps = supers // (GROUPS * UNROLL)
    per_split = tl.cdiv(steps, splits)
    first = split * per_split
    values += tile.to(tl.int64) * supers * (CHUNKS * ROWS * SLOTS)
    words += tile.to(tl.int64) * supers * (CHUNKS * ROWS * SLOTS // 8)
    r = tl.arange(0, GROUPS * ROWS)
    side, row = r // ROWS, r % ROWS
    slot = tl.arange(0, SLOTS)
    acc0 = tl.zeros([GROUPS * ROWS, SLOTS], tl.float32)
    acc1 = tl.zeros([GROUPS * ROWS, SLOTS], tl.float32)
    LOG: tl.constexpr = 1 if x.dtype.element_ty.primitive_bitwidth == 16 else 2
    for step in range(first, tl.minimum(first + per_split, steps)):
        for u in tl.static_range(UNROLL):
            group = (step * UNROLL + u) * GROUPS + side
            column = group * (SUPER * 16)
            for c in tl.static_range(CHUNKS):
                chunk = (group * CHUNKS + c) * ROWS + row
                loaded = tl.load(values + chunk[:, None] * SLOTS + slot[None, :])
                if JOINED:
                    position = loaded.to(tl.int32) & 15
                    value = (loaded >> 4).to(tl.float32)
                else:
                    position = _slot_positions(words, chunk, SLOTS)
                    value = loaded.to(tl.float32)
                base = column[:, None] + ((slot + c * SLOTS) // KEPT * 16)[None, :]
                there = (base + position < k) if MASK_K else None
                if SCALED > 1:
                    where = scales + column // SCALED * scale_stride + tile * ROWS + row
                    value *= tl.load(where, mask=column < k, other=0.0)[:, None]
                x0 = tl.load(_gather(x + base, position, LOG, ALIGNED), mask=there, other=0.0 if MASK_K else None)
                acc0 += value * x0.to(tl.float32)
                if BATCH == 2:
                    x1 = tl.load(
                        _gather(x + x_stride + base, position, LOG, ALIGNED), mask=there, other=0.0 if MASK_K else None
                    )
                    acc1 += value * x1.to(tl.float32)
    line = tile * ROWS + tl.arange(0, ROWS)
    y0 = tl.sum(tl.reshape(tl.sum(acc0, 1), [GROUPS, ROWS]), 0)
    y1 = tl.sum(tl.reshape(tl.sum(acc1, 1), [GROUPS, ROWS]), 0)
    if SCALED == 1:
        scale = tl.load(scales + line)
        y0 *= scale
        y1 *= scale
    if bias is not None:
        b = tl.load(bias + line, mask=line < n, other=0.0).to(tl.float32)
        y0 += b
        y1 += b
    out += split.to(tl.int64) * m * n
    tl.store(out + line, y0.to(out.dtype.element_ty), mask=line < n)
    if BATCH == 2:
        tl.store(out + n + line, y1.to(out.dtype.element_ty), mask=line < n)


@triton.jit
def _word(bits, places, index: tl.constexpr, KEPT: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """32 bits of a dense supergroup, int32 [R]: two values of two bytes or four of one, the first in the low bits.

    places: words of eight positions, or None: they are below the codes in `bits`.
    """
    PER: tl.constexpr = 32 // WIDTH
    g: tl.constexpr = index // (16 // PER)
    w: tl.constexpr = index % (16 // PER)
    word = tl.zeros([bits[0].shape[0]], tl.int32)
    for j in tl.static_range(KEPT):
        # Values ascend: the j-th of a group lies between columns j and j + 16 - KEPT. The rest is never compared.
        if j < (w + 1) * PER and j + 16 - KEPT >= w * PER:
            value = pick(bits[(g * KEPT + j) // SLOTS], (g * KEPT + j) % SLOTS, SLOTS)
            if places is None:
                place = value & 15
                value >>= 4
            else:
                place = (places[(g * KEPT + j) // 8] >> ((g * KEPT + j) % 8 * 4)) & 15
            value &= (1 << WIDTH) - 1
            word |= tl.where(place // PER == w, value << (place % PER * WIDTH), 0)
    return word


# A join puts the low bit of an index last: each of these joins the words `first`, first + STEP, ... in their order.
@triton.jit
def _words4(
    bits, places, first: tl.constexpr, STEP: tl.constexpr, KEPT: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr
):
    w0 = _word(bits, places, first, KEPT, SLOTS, WIDTH)
    w1 = _word(bits, places, first + STEP, KEPT, SLOTS, WIDTH)
    w2 = _word(bits, places, first + 2 * STEP, KEPT, SLOTS, WIDTH)
    w3 = _word(bits, places, first + 3 * STEP, KEPT, SLOTS, WIDTH)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def _words8(
    bits, places, first: tl.constexpr, STEP: tl.constexpr, KEPT: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr
):
    even = _words4(bits, places, first, 2 * STEP, KEPT, SLOTS, WIDTH)
    return tl.join(even, _words4(bits, places, first + STEP, 2 * STEP, KEPT, SLOTS, WIDTH))


@triton.jit
def _words16(
    bits, places, first: tl.constexpr, STEP: tl.constexpr, KEPT: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr
):
    even = _words8(bits, places, first, 2 * STEP, KEPT, SLOTS, WIDTH)
    return tl.join(even, _words8(bits, places, first + STEP, 2 * STEP, KEPT, SLOTS, WIDTH))


@triton.jit
def _tile(
    values, words, first,
    KEPT: tl.constexpr, SUPER: tl.constexpr, CHUNKS: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """GROUPS supergroups from `first` on as a dense tile [ROWS, GROUPS * SUPER * 16] of the values' dtype."""
    # A row's supergroups side by side: the tile is then a reshape of what threads hold.
    r = tl.arange(0, ROWS * GROUPS)
    slot = tl.arange(0, SLOTS)
    dtype = values.dtype.element_ty
    WIDTH: tl.constexpr = dtype.primitive_bitwidth
    bits = ()
    places = None if JOINED else ()
    for c in tl.static_range(CHUNKS):
        chunk = ((first + r % GROUPS) * CHUNKS + c) * ROWS + r // GROUPS
        loaded = tl.load(values + chunk[:, None] * SLOTS + slot[None, :])
        bits += (loaded if WIDTH == 8 else loaded.to(tl.int16, bitcast=True),)  # type: ignore[assignment]
        if not JOINED:
            if SLOTS == 8:
                places += (tl.load(words + chunk),)  # type: ignore[operator]
            else:
                pair = tl.load(words + chunk[:, None] * 2 + tl.arange(0, 2)[None, :])
                places += (pick(pair, 0, 2), pick(pair, 1, 2))  # type: ignore[operator]
    COUNT: tl.constexpr = SUPER * WIDTH // 2
    if COUNT == 8:
        joined = _words8(bits, places, 0, 1, KEPT, SLOTS, WIDTH)
    elif COUNT == 16:
        joined = _words16(bits, places, 0, 1, KEPT, SLOTS, WIDTH)
    else:
        tl.static_assert(COUNT == 32)
        joined = tl.join(
            _words16(bits, places, 0, 2, KEPT, SLOTS, WIDTH), _words16(bits, places, 1, 2, KEPT, SLOTS, WIDTH)
        )
    dense = tl.reshape(joined, [ROWS * GROUPS, COUNT])
    if WIDTH == 8:
        halves = tl.join(dense, dense >> 16)
        dense = tl.reshape(tl.join(halves, halves >> 8), [ROWS, GROUPS * SUPER * 16]).to(tl.int8)
    else:
        dense = tl.reshape(tl.join(dense, dense >> 16), [ROWS, GROUPS * SUPER * 16]).to(tl.int16)
        dense = dense.to(dtype, bitcast=True)
    return dense


@triton.jit
def dot(
    x, values, words, scales, bias, out,
    m, n, k, x_stride, supers, scale_stride, splits,
    BATCH: tl.constexpr, KEPT: tl.constexpr, SUPER: tl.constexpr, CHUNKS: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, UNROLL: tl.constexpr, MASK_K: tl.constexpr, SCALED: tl.constexpr,
    JOINED: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """One tile of rows, one part of K: partial sums of up to BATCH tokens on tensor cores.

    SAME: values, or codes, are multiplied in x's dtype; else both in float32.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    WIDE: tl.constexpr = GROUPS * SUPER * 16
    steps = supers // GROUPS
    per_split = tl.cdiv(steps, splits)
    first = split * per_split
    values += tile.to(tl.int64) * supers * (CHUNKS * ROWS * SLOTS)
    words += tile.to(tl.int64) * supers * (CHUNKS * ROWS * SLOTS // 8)
    operand = x.dtype.element_ty if SAME else tl.float32
    token = tl.arange(0, BATCH)
    line = tile * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, BATCH], tl.float32)
    for step in range(first, tl.minimum(first + per_split, steps)):
        column = step * WIDE + tl.arange(0, WIDE)
        there = (token < m)[:, None] & (column < k)[None, :] if MASK_K else (token < m)[:, None]
        tokens = tl.load(x + token[:, None] * x_stride + column[None, :], mask=there, other=0.0).to(operand)
        dense = _tile(values, words, step * GROUPS, KEPT, SUPER, CHUNKS, SLOTS, ROWS, GROUPS, JOINED).to(operand)
        if SCALED > 1:
            group = step * WIDE // SCALED
            known = line < tl.where(step * WIDE < k, scale_stride, 0)
            scale = tl.load(scales + group * scale_stride + line, mask=known, other=0.0)
            acc += tl.dot(dense, tl.trans(tokens), input_precision="ieee") * scale[:, None]
        else:
            acc = tl.dot(dense, tl.trans(tokens), acc, input_precision="ieee")
    if SCALED == 1:
        acc *= tl.load(scales + line)[:, None]
    if bias is not None:
        acc += tl.load(bias + line, mask=line < n, other=0.0).to(tl.float32)[:, None]
    out += split.to(tl.int64) * m * n
    there = (line < n)[:, None] & (token < m)[None, :]
    tl.store(out + token[None, :] * n + line[:, None], acc.to(out.dtype.element_ty), mask=there)


@triton.jit
def decompress(
    dense, values, words, scales, n, k, supers, scale_stride,
    KEPT: tl.constexpr, SUPER: tl.constexpr, CHUNKS: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, UNROLL: tl.constexpr, MASK_K: tl.constexpr, SCALED: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """One tile of rows, GROUPS supergroups: their part of the dense weight [n, k]."""
    tile, step = tl.program_id(0), tl.program_id(1)
    WIDE: tl.constexpr = GROUPS * SUPER * 16
    values += tile.to(tl.int64) * supers * (CHUNKS * ROWS * SLOTS)
    words += tile.to(tl.int64) * supers * (CHUNKS * ROWS * SLOTS // 8)
    block = _tile(values, words, step * GROUPS, KEPT, SUPER, CHUNKS, SLOTS, ROWS, GROUPS, JOINED)
    line = tile * ROWS + tl.arange(0, ROWS)
    column = step * WIDE + tl.arange(0, WIDE)
    if SCALED:
        group = step * WIDE // SCALED if SCALED > 1 else 0
        known = line < tl.where(step * WIDE < k, scale_stride, 0)
        scale = tl.load(scales + group * scale_stride + line, mask=known, other=0.0)
        block = block.to(tl.float32) * scale[:, None]
    there = (line < n)[:, None] & (column < k)[None, :]
    tl.store(dense + line.to(tl.int64)[:, None] * k + column[None, :], block.to(dense.dtype.element_ty), mask=there)
