"""Device code of blocks of 16x16; the layout is that of block.py, which launches these kernels.

Constants that all of them take: a program works on STEP blocks of a strip at once. MASK_K: the last block reaches past
x. SCALED: 0 no scales, 1 one per row, else columns per scale. Values are of the weight's dtype, int8, or int32 words of
eight int4. Weights are numbered in 32 bits: fewer than 2^31.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import int4


@triton.jit
def _part(offsets, STEP: tl.constexpr):
    """This program's blocks, [first, end): one of num_programs(1) parts of strip program_id(0)."""
    begin = tl.load(offsets + tl.program_id(0))
    stop = tl.load(offsets + tl.program_id(0) + 1)
    steps = tl.cdiv(stop - begin, STEP)
    per_split = tl.cdiv(steps, tl.num_programs(1)) * STEP
    first = begin + tl.program_id(1) * per_split
    return first, tl.minimum(first + per_split, stop)


@triton.jit
def _values(values, at, there):
    """Stored values number `at`, 0 where not `there`."""
    if values.dtype.element_ty == tl.int32:
        word = tl.load(values + at // 8, mask=there, other=0)
        found = int4(word >> (at % 8 * 4)).to(tl.int8)
    else:
        found = tl.load(values + at, mask=there, other=0)
    return found


@triton.jit
def gemv(
    x, values, columns, offsets, scales, bias, out,
    m, n, k, x_stride, scale_stride,
    BATCH: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr, UNROLL: tl.constexpr, MASK_K: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """One strip of rows, one part of its blocks: partial sums of 1 or 2 tokens. A thread reads SLOTS of a row."""
    PARTS: tl.constexpr = 16 // SLOTS
    first, end = _part(offsets, STEP * UNROLL)
    r = tl.arange(0, STEP * 16)
    part = tl.arange(0, PARTS)
    slot = tl.arange(0, SLOTS)
    side = (r // 16)[:, None] + part[None, :] * 0
    inside = part[None, :, None] * SLOTS + slot[None, None, :]
    acc0 = tl.zeros([STEP * 16, PARTS, SLOTS], tl.float32)
    acc1 = tl.zeros([STEP * 16, PARTS, SLOTS], tl.float32)
    for begin in range(first, end, STEP * UNROLL):
        for u in tl.static_range(UNROLL):
            block = begin + u * STEP + side
            # Past the part: zeros at the first columns, which x has.
            column = tl.load(columns + block, mask=block < end, other=0) * 16
            if values.dtype.element_ty == tl.int32:
                at = (begin + u * STEP) * 32 + r[:, None] * 2 + part[None, :]
                word = tl.load(values + at, mask=block < end, other=0)
                value = int4(word[:, :, None] >> (slot * 4)[None, None, :]).to(tl.float32)
            else:
                at = (begin + u * STEP) * 256 + r[:, None, None] * 16 + inside
                value = tl.load(values + at, mask=(block < end)[:, :, None], other=0).to(tl.float32)
            if SCALED > 1:
                # Rows do follow each other: but loaded side by side, scales would have to change threads.
                line = tl.max_contiguous(tl.program_id(0) * 16 + r[:, None] % 16, [1, 1])
                value *= tl.load(scales + column // SCALED * scale_stride + line)[:, :, None]
            place = column[:, :, None] + inside
            there = place < k if MASK_K else None
            acc0 += value * tl.load(x + place, mask=there, other=0.0 if MASK_K else None).to(tl.float32)
            if BATCH == 2:
                other = tl.load(x + x_stride + place, mask=there, other=0.0 if MASK_K else None)
                acc1 += value * other.to(tl.float32)
    line = tl.program_id(0) * 16 + tl.arange(0, 16)
    y0 = tl.sum(tl.reshape(tl.sum(tl.sum(acc0, 2), 1), [STEP, 16]), 0)
    y1 = tl.sum(tl.reshape(tl.sum(tl.sum(acc1, 2), 1), [STEP, 16]), 0)
    if SCALED == 1:
        scale = tl.load(scales + line)
        y0 *= scale
        y1 *= scale
    if bias is not None:
        b = tl.load(bias + line, mask=line < n, other=0.0).to(tl.float32)
        y0 += b
        y1 += b
    out += tl.program_id(1).to(tl.int64) * m * n
    tl.store(out + line, y0.to(out.dtype.element_ty), mask=line < n)
    if BATCH == 2:
        tl.store(out + n + line, y1.to(out.dtype.element_ty), mask=line < n)


@triton.jit
def dot(
    x, values, columns, offsets, scales, bias, out,
    m, n, k, x_stride, scale_stride,
    BATCH: tl.constexpr, STEP: tl.constexpr, MASK_K: tl.constexpr, SCALED: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """One strip of rows, one part of its blocks, BATCH tokens on tensor cores.

    SAME: values, or codes, are multiplied in x's dtype; else both in float32. Scales of groups: STEP is 1.
    """
    first, end = _part(offsets, STEP)
    operand = x.dtype.element_ty if SAME else tl.float32
    token = tl.program_id(2) * BATCH + tl.arange(0, BATCH)
    line = tl.program_id(0) * 16 + tl.arange(0, 16)
    c = tl.arange(0, STEP * 16)
    acc = tl.zeros([16, BATCH], tl.float32)
    for begin in range(first, end, STEP):
        block = begin + c // 16
        column = tl.load(columns + block, mask=block < end, other=0) * 16 + c % 16
        at = begin * 256 + (c // 16 * 256 + c % 16)[None, :] + tl.arange(0, 16)[:, None] * 16
        value = _values(values, at, (block < end)[None, :]).to(operand)
        there = (token < m)[:, None] & (column < k)[None, :] if MASK_K else (token < m)[:, None]
        tokens = tl.load(x + token.to(tl.int64)[:, None] * x_stride + column[None, :], mask=there, other=0.0)
        if SCALED > 1:
            total = tl.dot(value, tl.trans(tokens.to(operand)), input_precision="ieee")
            group = tl.load(columns + begin) * 16 // SCALED
            acc += total * tl.load(scales + group * scale_stride + line)[:, None]
        else:
            acc = tl.dot(value, tl.trans(tokens.to(operand)), acc, input_precision="ieee")
    if SCALED == 1:
        acc *= tl.load(scales + line)[:, None]
    if bias is not None:
        acc += tl.load(bias + line, mask=line < n, other=0.0).to(tl.float32)[:, None]
    out += tl.program_id(1).to(tl.int64) * m * n
    there = (line < n)[:, None] & (token < m)[None, :]
    tl.store(out + token[None, :] * n + line[:, None], acc.to(out.dtype.element_ty), mask=there)


@triton.jit
def decompress(
    dense, values, columns, offsets, scales, n, k, scale_stride,
    STEP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One part of one strip's blocks into a dense weight [n, k] of zeros."""
    first, end = _part(offsets, STEP)
    line = tl.program_id(0) * 16 + tl.arange(0, 16)
    c = tl.arange(0, STEP * 16)
    for begin in range(first, end, STEP):
        block = begin + c // 16
        column = tl.load(columns + block, mask=block < end, other=0) * 16 + c % 16
        at = begin * 256 + (c // 16 * 256 + c % 16)[None, :] + tl.arange(0, 16)[:, None] * 16
        value = _values(values, at, (block < end)[None, :])
        if SCALED:
            group = column // SCALED if SCALED > 1 else column * 0
            value = value.to(tl.float32) * tl.load(scales + group[None, :] * scale_stride + line[:, None])
        there = (line < n)[:, None] & ((block < end) & (column < k))[None, :]
        place = dense + line.to(tl.int64)[:, None] * k + column[None, :]
        tl.store(place, value.to(dense.dtype.element_ty), mask=there)
