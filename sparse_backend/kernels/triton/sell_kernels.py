"""Device code of arbitrary patterns; the layout is that of sell.py, which launches these kernels.

Values are of the weight's dtype, int8, or int32 words of eight int4. SCALED: 0 no scales, 1 one per row, else columns
per scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import int4, pick


@triton.jit
def _values(values, row, there, SLOTS: tl.constexpr):
    """Stored values of rows `row` [R] of SLOTS each, [R, SLOTS]. there: a mask [1, 1], or None."""
    if values.dtype.element_ty == tl.int32:
        place = row[:, None] * (SLOTS // 8) + tl.arange(0, SLOTS // 8)[None, :]
        words = tl.load(values + place, mask=there, other=None if there is None else 0)
        codes = int4(words[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :])
        found = tl.reshape(codes, [row.shape[0], SLOTS])
    else:
        place = row[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
        found = tl.load(values + place, mask=there, other=None if there is None else 0)
    return found


@triton.jit
def gemv(
    x, values, positions, starts, offsets, rows, scales, bias, out,
    m, n, x_stride, parts, lines,
    BATCH: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One part of one slice: partial sums of 1 or 2 tokens, one row per thread."""
    piece, part = tl.program_id(0), tl.program_id(1)
    line = piece * ROWS + tl.arange(0, ROWS)
    row_inside = tl.arange(0, ROWS)
    inside = row_inside[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
    column = tl.load(starts + part * lines + line)
    first = tl.load(offsets + piece * (parts + 1) + part)
    count = tl.load(offsets + piece * (parts + 1) + part + 1) - first
    PER: tl.constexpr = 8 if values.dtype.element_ty == tl.int32 else 1
    values += first.to(tl.int64) * (ROWS * SLOTS // PER)
    positions += first.to(tl.int64) * (ROWS * SLOTS)
    acc0 = tl.zeros([ROWS, SLOTS], tl.float32)
    acc1 = tl.zeros([ROWS, SLOTS], tl.float32)
    for begin in range(0, count, UNROLL):
        for u in tl.static_range(UNROLL):
            chunk = (begin + u) * (ROWS * SLOTS)
            there = tl.full([1, 1], begin + u, tl.int32) < count
            # Beyond the part: zeros at the column that was last, which x has.
            position = tl.load(positions + chunk + inside, mask=there, other=0).to(tl.int32)
            value = _values(values, (begin + u) * ROWS + row_inside, there, SLOTS).to(tl.float32)
            if SCALED > 1:
                value *= tl.load(scales + (column[:, None] + position) // SCALED * lines + line[:, None])
            pointer = x + column[:, None] + position
            acc0 += value * tl.load(pointer).to(tl.float32)
            if BATCH == 2:
                acc1 += value * tl.load(pointer + x_stride).to(tl.float32)
            column += pick(position, SLOTS - 1, SLOTS)
    y0 = tl.sum(acc0, 1)
    y1 = tl.sum(acc1, 1)
    row = tl.load(rows + line)
    stored = row >= 0
    if SCALED == 1:
        scale = tl.load(scales + line)
        y0 *= scale
        y1 *= scale
    if bias is not None:
        b = tl.load(bias + row, mask=stored, other=0.0).to(tl.float32)
        y0 += b
        y1 += b
    out += part.to(tl.int64) * m * n
    tl.store(out + row, y0.to(out.dtype.element_ty), mask=stored)
    if BATCH == 2:
        tl.store(out + n + row, y1.to(out.dtype.element_ty), mask=stored)


@triton.jit
def batched(
    x, values, positions, starts, offsets, rows, scales, bias, out,
    m, n, x_stride, parts, lines,
    BATCH: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One part of one slice, BATCH tokens: x is transposed, [K, tokens], and every value reads a row of it."""
    piece, part = tl.program_id(0), tl.program_id(1)
    line = piece * ROWS + tl.arange(0, ROWS)
    inside = tl.arange(0, ROWS) * SLOTS
    token = tl.program_id(2) * BATCH + tl.arange(0, BATCH)
    column = tl.load(starts + part * lines + line)
    first = tl.load(offsets + piece * (parts + 1) + part)
    count = tl.load(offsets + piece * (parts + 1) + part + 1) - first
    PER: tl.constexpr = 8 if values.dtype.element_ty == tl.int32 else 1
    values += first.to(tl.int64) * (ROWS * SLOTS // PER)
    positions += first.to(tl.int64) * (ROWS * SLOTS)
    acc = tl.zeros([ROWS, BATCH], tl.float32)
    for chunk in range(0, count):
        begin = chunk * (ROWS * SLOTS)
        for j in tl.static_range(SLOTS):
            # Slot by slot: a tile of them would have to change threads through shared memory.
            position = column + tl.load(positions + begin + inside + j).to(tl.int32)
            if values.dtype.element_ty == tl.int32:
                word = tl.load(values + (begin + inside) // 8 + j // 8)
                value = int4(word >> (j % 8 * 4)).to(tl.float32)
            else:
                value = tl.load(values + begin + inside + j).to(tl.float32)
            if SCALED > 1:
                value *= tl.load(scales + position // SCALED * lines + line)
            tokens = tl.load(x + position[:, None] * x_stride + token[None, :])
            acc += value[:, None] * tokens.to(tl.float32)
            if j == SLOTS - 1:
                column = position
    row = tl.load(rows + line)
    if SCALED == 1:
        acc *= tl.load(scales + line)[:, None]
    if bias is not None:
        acc += tl.load(bias + row, mask=row >= 0, other=0.0).to(tl.float32)[:, None]
    out += part.to(tl.int64) * m * n
    there = (row >= 0)[:, None] & (token < m)[None, :]
    tl.store(out + token[None, :] * n + row[:, None], acc.to(out.dtype.element_ty), mask=there)


@triton.jit
def decompress(
    dense, values, positions, starts, offsets, rows, scales, k, parts, lines,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One part of one slice into a dense weight [N, k] of zeros."""
    piece, part = tl.program_id(0), tl.program_id(1)
    line = piece * ROWS + tl.arange(0, ROWS)
    inside = tl.arange(0, ROWS)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
    column = tl.load(starts + part * lines + line)
    row = tl.load(rows + line)
    scale = tl.load(scales + line) if SCALED == 1 else tl.full([ROWS], 1.0, tl.float32)
    base = dense + tl.maximum(row, 0).to(tl.int64) * k
    first = tl.load(offsets + piece * (parts + 1) + part)
    count = tl.load(offsets + piece * (parts + 1) + part + 1) - first
    PER: tl.constexpr = 8 if values.dtype.element_ty == tl.int32 else 1
    values += first.to(tl.int64) * (ROWS * SLOTS // PER)
    positions += first.to(tl.int64) * (ROWS * SLOTS)
    for chunk in range(0, count):
        begin = chunk * (ROWS * SLOTS)
        position = tl.load(positions + begin + inside).to(tl.int32)
        value = _values(values, chunk * ROWS + tl.arange(0, ROWS), None, SLOTS)
        # Fillers are zeros and may lie where a weight is: they are not written.
        there = (row >= 0)[:, None] & (value != 0)
        stored = value.to(tl.float32) * scale[:, None]
        if SCALED > 1:
            stored *= tl.load(scales + (column[:, None] + position) // SCALED * lines + line[:, None])
        tl.store(base[:, None] + (column[:, None] + position), stored.to(dense.dtype.element_ty), mask=there)
        column += pick(position, SLOTS - 1, SLOTS)
