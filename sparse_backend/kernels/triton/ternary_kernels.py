"""Device code of ternary weights; the layout is that of ternary.py, which launches these kernels.

Codes are 0, 1, 2 for -1, 0, 1: a sum over codes is a sum over weights plus the sum of the activations, which `quantise`
writes per unit of 64 columns, or 32 where scales stand for 32. `rows` are rows of int8 numbers: LIMBS per token.
"""

# Tuples of tensors grow in loops, which are unrolled.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantise(
    x, absmax, codes, sums, steps, k, columns, x_stride,
    LIMBS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token as int8: codes [LIMBS, columns] of it, their sums per unit, and what one step of the first limb is.

    One limb rounds as transformers' BitNet layers do. Three hold round(x * 2^22 / 2^e), absmax < 2^e, eight bits each.
    absmax: float32, one for each token, or None: the largest magnitude of x.
    """
    token = tl.program_id(0)
    x += token.to(tl.int64) * x_stride
    codes += token.to(tl.int64) * LIMBS * columns
    sums += token.to(tl.int64) * LIMBS * (columns // UNIT)
    inside = tl.arange(0, BLOCK)
    if absmax is None:
        most = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, k, BLOCK):
            value = tl.load(x + begin + inside, mask=begin + inside < k, other=0.0).to(tl.float32)
            # Magnitudes compare as integers do, and NaN is above infinity.
            most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        largest = tl.max(most, 0)
    else:
        largest = tl.load(absmax + token).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    finite = largest < 0x7F800000
    if LIMBS == 1:
        magnitude = largest.to(tl.float32, bitcast=True)
        scale = tl.div_rn(1.0, tl.maximum(magnitude, 1e-5)) * 127.0  # torch's `127 / tensor`, to the bit
        step = tl.div_rn(1.0, scale)
    else:
        exponent = tl.maximum((largest >> 23) - 126, -104)  # absmax < 2^exponent
        scale = ((149 - exponent) << 23).to(tl.float32, bitcast=True)
        step = ((121 + exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(steps + token, tl.where(finite, step, float("nan")))
    for begin in range(0, columns, BLOCK):
        column = begin + inside
        value = tl.load(x + column, mask=column < tl.where(finite, k, 0), other=0.0).to(tl.float32)
        # 1.5 * 2^23 leaves the nearest even integer in the low bits.
        q = (value * scale + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        if LIMBS == 1:
            q = tl.minimum(tl.maximum(q, -128), 127)
        for back in tl.static_range(LIMBS):
            limb = LIMBS - 1 - back
            low = ((q + 128) & 255) - 128
            q = (q - low) >> 8
            tl.store(codes + limb * columns + column, low.to(tl.int8), mask=column < columns)
            unit = (begin // UNIT) + tl.arange(0, BLOCK // UNIT)
            total = tl.sum(tl.reshape(low, [BLOCK // UNIT, UNIT]), 1)
            tl.store(sums + limb * (columns // UNIT) + unit, total, mask=unit < columns // UNIT)


@triton.jit
def _dp4a(codes, x, total, PTX: tl.constexpr):
    """total + the products of four unsigned bytes and four signed ones."""
    if PTX:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        up = (24 - 8 * tl.arange(0, 4))[None, None, :]
        total += tl.sum(((codes[:, :, None] << up) >> 24) * ((x[:, :, None] << up) >> 24), 2)
    return total


@triton.jit
def gemv(
    x, sums, words, scales, out,
    rows, n, columns, chunks, scale_stride, splits,
    BATCH: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, UNROLL: tl.constexpr, UNIT: tl.constexpr,
    SCALED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One tile of rows, one part of K, BATCH rows of x: a thread owns a row of GROUPS chunks.

    SCALED: columns per scale, 0 for one per row. Codes that lie two bits up are multiplied there, four times too
    large, and their sum is shifted back once.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    steps = chunks // (GROUPS * UNROLL)
    per_split = tl.cdiv(steps, splits)
    first = split * per_split
    words += tile.to(tl.int64) * chunks * (ROWS * 4)
    r = tl.arange(0, GROUPS * ROWS)
    side, row = r // ROWS, r % ROWS
    lane = tl.arange(0, 4)
    units = columns // UNIT
    none = tl.zeros([GROUPS * ROWS, 4], tl.int32)
    low, high, less, scaled = (), (), (), ()
    for _ in tl.static_range(BATCH):
        low += (none,)
        high += (none,)
        less += (tl.zeros([GROUPS * ROWS], tl.int32),)
        scaled += (tl.zeros([GROUPS * ROWS], tl.float32),)
    for step in range(first, tl.minimum(first + per_split, steps)):
        for u in tl.static_range(UNROLL):
            chunk = (step * UNROLL + u) * GROUPS + side
            word = tl.load(words + (chunk * ROWS + row)[:, None] * 4 + lane[None, :])
            for half in tl.static_range(2):
                codes = (word >> (4 * half)) & 0x03030303
                codes4 = (word >> (4 * half)) & 0x0C0C0C0C
                unit = chunk * (64 // UNIT) + half * (64 // UNIT - 1)
                # A unit of sums ends here: of 32 columns always, of 64 at their second half.
                if SCALED and (UNIT == 32 or half == 1):
                    group = (chunk * 64 + 32 * half) // SCALED
                    scale = tl.load(scales + group * scale_stride + tile * ROWS + row)
                new_low, new_high, new_less, new_scaled = (), (), (), ()
                for b in tl.static_range(BATCH):
                    at = x + b * (columns // 4) + (chunk * 16 + half * 8)[:, None] + lane[None, :]
                    low_b = _dp4a(codes, tl.load(at), low[b], PTX)
                    high_b = _dp4a(codes4, tl.load(at + 4), high[b], PTX)
                    less_b, scaled_b = less[b], scaled[b]
                    if UNIT == 32 or half == 1:
                        less_b += tl.load(sums + b * units + unit)
                        if SCALED:
                            total = tl.sum(low_b + (high_b >> 2), 1) - less_b
                            scaled_b += total.to(tl.float32) * scale
                            low_b, high_b, less_b = none, none, tl.zeros([GROUPS * ROWS], tl.int32)
                    new_low += (low_b,)
                    new_high += (high_b,)
                    new_less += (less_b,)
                    new_scaled += (scaled_b,)
                low, high, less, scaled = new_low, new_high, new_less, new_scaled
    line = tile * ROWS + tl.arange(0, ROWS)
    out += split.to(tl.int64) * rows * n
    for b in tl.static_range(BATCH):
        y = scaled[b]
        if not SCALED:
            y = (tl.sum(low[b] + (high[b] >> 2), 1) - less[b]).to(tl.float32)
        tl.store(out + b * n + line, tl.sum(tl.reshape(y, [GROUPS, ROWS]), 0), mask=line < n)


@triton.jit
def _bytes(words, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Words of four codes as a tile int8 [ROWS, COLUMNS]."""
    halves = tl.join(words, words >> 16)
    return tl.reshape(tl.join(halves, halves >> 8), [ROWS, COLUMNS]).to(tl.int8)


@triton.jit
def _half(word, half: tl.constexpr):
    """Codes of 32 columns of a chunk, words of four bytes [R, 8]."""
    pair = tl.join((word >> (4 * half)) & 0x03030303, (word >> (4 * half + 2)) & 0x03030303)
    return tl.reshape(tl.permute(pair, [0, 2, 1]), [word.shape[0], 8])


@triton.jit
def _tile(words, first, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """GROUPS chunks from `first` on as codes int8 [ROWS, 64 GROUPS]."""
    r = tl.arange(0, ROWS * GROUPS)
    chunk = (first + r % GROUPS) * ROWS + r // GROUPS
    word = tl.load(words + chunk[:, None] * 4 + tl.arange(0, 4)[None, :])
    low = tl.join(word & 0x03030303, (word >> 4) & 0x03030303)
    high = tl.join((word >> 2) & 0x03030303, (word >> 6) & 0x03030303)
    quads = tl.reshape(tl.permute(tl.join(low, high), [0, 2, 3, 1]), [ROWS * GROUPS, 16])
    return _bytes(quads, GROUPS * 64, ROWS)


@triton.jit
def dot(
    x, sums, words, scales, out,
    rows, n, columns, chunks, scale_stride, splits,
    BATCH: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, UNIT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One tile of rows, one part of K, BATCH rows of x on tensor cores. SCALED: columns per scale, 0 for none."""
    tile, split = tl.program_id(0), tl.program_id(1)
    steps = chunks // GROUPS
    per_split = tl.cdiv(steps, splits)
    first = split * per_split
    words += tile.to(tl.int64) * chunks * (ROWS * 4)
    token = tl.program_id(2) * BATCH + tl.arange(0, BATCH)
    line = tile * ROWS + tl.arange(0, ROWS)
    units = columns // UNIT
    # x has whole batches of rows; those past `rows` hold anything and are not stored.
    row_at = x + token.to(tl.int64)[:, None] * columns
    sum_at = sums + token * units
    acc = tl.zeros([ROWS, BATCH], tl.int32)
    less = tl.zeros([BATCH], tl.int32)
    scaled = tl.zeros([ROWS, BATCH], tl.float32)
    for step in range(first, tl.minimum(first + per_split, steps)):
        if UNIT == 32:
            word = tl.load(words + (step * ROWS + tl.arange(0, ROWS))[:, None] * 4 + tl.arange(0, 4)[None, :])
            for half in tl.static_range(2):
                column = step * 64 + half * 32
                codes = _bytes(_half(word, half), 32, ROWS)
                tokens = tl.load(row_at + column + tl.arange(0, 32)[None, :])
                total = tl.dot(codes, tl.trans(tokens), out_dtype=tl.int32)
                total -= tl.load(sum_at + step * 2 + half)[None, :]
                scale = tl.load(scales + column // SCALED * scale_stride + line)
                scaled += total.to(tl.float32) * scale[:, None]
        else:
            tokens = tl.load(row_at + step * (GROUPS * 64) + tl.arange(0, GROUPS * 64)[None, :])
            codes = _tile(words, step * GROUPS, ROWS, GROUPS)
            taken = tl.zeros([BATCH], tl.int32)
            for g in tl.static_range(GROUPS):
                taken += tl.load(sum_at + step * GROUPS + g)
            if SCALED:
                total = tl.dot(codes, tl.trans(tokens), out_dtype=tl.int32) - taken[None, :]
                scale = tl.load(scales + step * (GROUPS * 64) // SCALED * scale_stride + line)
                scaled += total.to(tl.float32) * scale[:, None]
            else:
                acc = tl.dot(codes, tl.trans(tokens), acc, out_dtype=tl.int32)
                less += taken
    y = scaled if SCALED else (acc - less[None, :]).to(tl.float32)
    out += split.to(tl.int64) * rows * n
    there = (line < n)[:, None] & (token < rows)[None, :]
    tl.store(out + token.to(tl.int64)[None, :] * n + line[:, None], y, mask=there)


@triton.jit
def finish(
    partial, steps, scales, bias, y, rows, n, stride, splits,
    LIMBS: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [M, n] from partial [splits, rows, stride]: parts summed in order, limbs weighed, scaled, bias added."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < n
    total = tl.zeros([BLOCK], tl.float32)
    for back in tl.static_range(LIMBS):
        part = tl.zeros([BLOCK], tl.float32)
        at = partial + (token * LIMBS + LIMBS - 1 - back).to(tl.int64) * stride + column
        for _ in range(splits):
            part += tl.load(at, mask=there, other=0).to(tl.float32)
            at += rows.to(tl.int64) * stride
        total = total * 0.00390625 + part
    total *= tl.load(steps + token)
    if not SCALED:
        total *= tl.load(scales + column, mask=there, other=0.0)
    if bias is not None:
        total += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    tl.store(y + token.to(tl.int64) * n + column, total.to(y.dtype.element_ty), mask=there)


@triton.jit
def decompress(
    dense, words, scales, n, k, chunks, scale_stride,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SCALED: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """One tile of rows, GROUPS chunks, as their part of dense [n, k]. CODES: -1, 0, 1 unscaled."""
    tile, step = tl.program_id(0), tl.program_id(1)
    words += tile.to(tl.int64) * chunks * (ROWS * 4)
    block = _tile(words, step * GROUPS, ROWS, GROUPS) - 1
    line = tile * ROWS + tl.arange(0, ROWS)
    column = step * (GROUPS * 64) + tl.arange(0, GROUPS * 64)
    if not CODES:
        group = column // SCALED if SCALED else column * 0
        scale = tl.load(scales + group[None, :] * scale_stride + line[:, None])
        block = block.to(tl.float32) * scale
    there = (line < n)[:, None] & (column < k)[None, :]
    tl.store(dense + line.to(tl.int64)[:, None] * k + column[None, :], block.to(dense.dtype.element_ty), mask=there)
