"""Ternary weights on GPUs: two bits a weight, activations as int8, integer sums.

Machine form: tiles of 64 rows; a *chunk* is 64 columns of a row, 16 bytes, what a thread reads at once. Column
32 h + 16 i + 4 w + b of a chunk is in bits 4 h + 2 i and up of byte b of word w: one mask of a word, shifted or not,
gives four neighbouring columns as four bytes, which dp4a multiplies with a word of activations, and the four words of
a chunk read 16 neighbouring bytes of x. Padding: N to 64 rows, K to 512 columns, of weight zero. At 1.6 bits in the
canonical form, weights are 2 bits here: digits to base 3 cost more instructions than the bytes they save.

Activations: `int8` rounds each token as BitNet b1.58 does (transformers' activation_quant: half to even, one scale
127 / max(absmax, 1e-5)), then every sum is exact. `keep` makes three int8 *limbs* of each activation, as the CPU
kernels do: 22 bits under the power of two above the token's absmax. An activation is off by absmax / 2^22 at most, and
not at all if it is bf16 and within 2^-14 of absmax; a product is by absmax / 2^22 * sum |w| at most, about what float32
sums lose. Sums of limbs are exact too: 128 * 65536 columns fit float32.
A token with NaN or Inf gives NaN.

Up to four rows of limbs: dp4a, plain integers where there is none (AMD, the interpreter). More: int8 `tl.dot`. From 65
tokens on (prefill) decompressed to a scratch shared by all layers: for `int8` as codes for torch's int8 product, for
`keep`, and for `int8` under scales of groups, in x's dtype. No atomics: parts of K are summed in a second pass, in a
fixed order.
"""

from __future__ import annotations

import torch
import triton

from ...errors import WeightError
from ...packed import MachineWeight, PackedWeight
from . import ternary_kernels
from .common import (
    TILE_ROWS,
    Launch,
    dense_product,
    flat,
    interpreted,
    launch,
    placed,
    register,
    require,
    reserve,
    scratch,
    splits_for,
)
from .tuning import launches

CHUNK = 64  # columns of 16 bytes
PAD = 8  # chunks: every launch's step divides it
MAX_COLUMNS = 65536  # what sums of limbs in float32 hold exactly
MAX_GEMV, MAX_TOKENS = 4, 64
GROUP_SIZES = (32, 64, 128, 256)
LIMBS = {"int8": 1, "keep": 3}

# By (kernel, rows of limbs a program works on).
LAUNCHES = {
    ("gemv", 1): Launch(groups=2, unroll=4, num_warps=4),
    ("gemv", 2): Launch(groups=2, unroll=4, num_warps=4),
    ("gemv", 3): Launch(groups=2, unroll=2, num_warps=4),
    ("gemv", 4): Launch(groups=2, unroll=2, num_warps=4),
    ("dot", 16): Launch(groups=2, unroll=1, num_warps=4),  # 4 spill on sm_100
    ("dot", 32): Launch(groups=4, unroll=1, num_warps=4),
    ("dot", 64): Launch(groups=2, unroll=1, num_warps=4),
    ("decompress", 0): Launch(groups=2, unroll=1, num_warps=4),
}

# What tuning.py may try, by kernel: groups, unroll, warps. A loop's step divides what K is padded to.
GRID = {
    "gemv": ((1, 2, 4), (1, 2, 4, 8), (2, 4, 8)),
    "dot": ((1, 2, 4), (1,), (4, 8)),
}
MOST_STEPS = PAD

# Instructions of the loop per weight, by (kernel, rows of limbs, scales of groups); tools/gpu_offline.py asserts them
# for sm_80, sm_90 and sm_100. An H200 issues about 1.7 per 2-bit weight in the time it reads one; half of that if they
# are integers. Beyond two rows a weight is read slower than memory could.
BUDGET = {
    ("gemv", 1, False): 1.0, ("gemv", 2, False): 1.5, ("gemv", 3, False): 2.0, ("gemv", 4, False): 2.5,
    ("gemv", 1, True): 1.7, ("gemv", 2, True): 2.5, ("gemv", 3, True): 3.3, ("gemv", 4, True): 4.2,
    ("dot", 16, False): 2.2,
}  # fmt: skip
_FINISH_BLOCK = 256
_MOST_QUANTISED = 8192  # columns that `quantise` holds at once


def refusal(packed: PackedWeight) -> str | None:
    """Why no kernel here runs a weight, or None."""
    k = packed.shape[1]
    return None if k <= MAX_COLUMNS else f"ternary: GPU kernels hold up to {MAX_COLUMNS} columns, this weight has {k}"


def lower(packed: PackedWeight, device: torch.device) -> MachineWeight:
    """The machine form of canonical `ternary`, made by torch where the tensors are.

    Returns:
        `words` int32 [tiles, chunks, 64, 4]; `scales` float32 [groups, 64 tiles], one group unless the weight has
        more; `limbs` uint8 [1 or 3, 0]: how many int8 an activation becomes, in a shape, as reading a number back would
        make every call wait for the GPU.

    Raises:
        WeightError: codes that are none, or more columns than sums hold.
    """
    require(refusal(packed))
    n, k = packed.shape
    tensors = placed(packed, device)
    size = packed.attributes["group_size"]
    codes = _codes(tensors["codes"], packed.attributes["bits"], k)
    tiles, chunks = -(-n // TILE_ROWS), -(-k // CHUNK)
    chunks += -chunks % PAD
    padded = torch.nn.functional.pad(codes, (0, chunks * CHUNK - k, 0, tiles * TILE_ROWS - n), value=1)
    parts = padded.view(tiles, TILE_ROWS, chunks, 4, 16)
    joined = parts[..., 0, :] | (parts[..., 1, :] << 2) | (parts[..., 2, :] << 4) | (parts[..., 3, :] << 6)
    words = joined.transpose(1, 2).contiguous().view(torch.int32)

    scales = tensors["scales"].float().expand(n, -1)
    if scales.shape[1] == 1:
        size = 0
    wide = chunks * CHUNK // size if size else 1
    scales = torch.nn.functional.pad(scales, (0, wide - scales.shape[1], 0, tiles * TILE_ROWS - n)).T.contiguous()
    limbs = scales.new_zeros(LIMBS[packed.attributes["activations"]], 0, dtype=torch.uint8)
    reserve(words.device, max(n * k, padded.numel() // 2))
    return MachineWeight(
        packed.format, packed.shape, packed.dtype, {"words": words, "scales": scales, "limbs": limbs}, "cuda"
    )


def _codes(stored: torch.Tensor, bits: float, k: int) -> torch.Tensor:
    """Codes 0, 1, 2 as uint8 [N, K] of the canonical form."""
    if bits == 2:
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=stored.device)
        codes = (stored[:, :, None] >> shifts) & 3
    else:
        powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=stored.device)
        codes = stored[:, :, None] // powers
        if bool((codes[..., -1] > 2).any()):
            raise WeightError("ternary: a byte of codes is above 242")
        codes %= 3
    codes = codes.flatten(1)[:, :k]
    if bool((codes > 2).any()):
        raise WeightError("ternary: a code is none of 0, 1, 2")
    return codes


def naive_unpack(words: torch.Tensor, scales: torch.Tensor, k: int) -> torch.Tensor:
    """The dense weight [64 tiles, K] float32 that a machine form stands for: what every kernel here computes with."""
    tiles, chunks, rows, _ = words.shape
    joined = words.view(torch.uint8).view(tiles, chunks, rows, 1, 16)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=words.device).view(4, 1)
    codes = ((joined >> shifts) & 3).transpose(1, 2).reshape(tiles * rows, chunks * CHUNK)
    size = scale_group(scales, chunks) or chunks * CHUNK
    return ((codes.float() - 1) * scales.T.repeat_interleave(size, dim=1))[:, :k]


def scale_group(scales: torch.Tensor, chunks: int) -> int:
    """Columns per scale; 0 for one scale per row."""
    return chunks * CHUNK // scales.shape[0] if scales.shape[0] > 1 else 0


def dot_groups(setting: Launch, size: int) -> int:
    """Chunks side by side of the kernel `dot`: those of one scale at most."""
    return max(1, min(setting.groups, size // CHUNK)) if size else setting.groups


def most_rows(size: int) -> int:
    """Rows of limbs that a program of `dot` works on at most: sums of small groups need registers."""
    return 32 if size == 32 else 64


def linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    limbs: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    absmax: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [..., N] in x's dtype from x [..., K] and the tensors of `lower`.

    Args:
        absmax: float32, each token's largest magnitude to round by, where x is a part of the token; None: that of x.
    """
    k, n = x.shape[-1], out_features
    x2 = flat(x)
    m = x2.shape[0]
    torch._check(
        absmax is None or (absmax.dtype == torch.float32 and absmax.is_contiguous() and absmax.numel() == m),
        lambda: "absmax must be a contiguous float32 tensor with one value per token",
    )
    y = x.new_empty(m, n)
    if not y.numel():
        return y.view(*x.shape[:-1], n)
    count, (tiles, chunks) = limbs.shape[0], words.shape[:2]
    size = scale_group(scales, chunks)
    if m > MAX_TOKENS and count > 1:
        dense = decompress(scratch(x, (n, k)), words, scales)
        return dense_product(x2, dense, bias).view(*x.shape[:-1], n)
    rows = m * count
    form = "gemv" if rows <= MAX_GEMV else "dot"
    batch = rows if form == "gemv" else min(most_rows(size), max(16, triton.next_power_of_2(rows)))
    blocks = -(-rows // batch)
    unit = min(size, CHUNK) or CHUNK
    codes, sums, steps = quantise(x2, blocks * batch, count, chunks * CHUNK, unit, absmax)
    if m > MAX_TOKENS and size:
        # 128ths, which are as exact: sums of the codes themselves would overflow float16.
        shares = codes[:m, :k].to(x.dtype).div_(128)
        part = dense_product(shares, decompress(scratch(x, (n, k)), words, scales), None)
        return _finish(part[None], steps * 128, scales, bias, y, 1, True).view(*x.shape[:-1], n)
    if m > MAX_TOKENS:
        dense = decompress(scratch(codes, (tiles * TILE_ROWS, chunks * CHUNK)), words, scales)
        _finish(torch._int_mm(codes[:m], dense.T)[None], steps, scales, bias, y, 1, False)
        return y.view(*x.shape[:-1], n)
    setting = launches(x.device, "ternary")[form, batch]
    constants = {"BATCH": batch, "ROWS": TILE_ROWS, "UNIT": unit, "SCALED": size, "num_warps": setting.num_warps}
    if form == "gemv":
        kernel, codes, groups = ternary_kernels.gemv, codes.view(torch.int32), setting.groups
        constants |= {"UNROLL": setting.unroll, "PTX": not interpreted() and torch.version.hip is None}
    else:
        kernel, groups = ternary_kernels.dot, dot_groups(setting, size)
    splits = splits_for(tiles * blocks, chunks // (groups * setting.unroll))
    partial = x.new_empty(splits, rows, n, dtype=torch.float32)
    launch(
        kernel, (tiles, splits, blocks), codes, sums, words, scales, partial,
        rows, n, chunks * CHUNK, chunks, scales.shape[1], splits, GROUPS=groups, num_stages=1, **constants,
    )  # fmt: skip
    return _finish(partial, steps, scales, bias, y, count, size > 0).view(*x.shape[:-1], n)


def quantise(
    x: torch.Tensor, rows: int, limbs: int, columns: int, unit: int, absmax: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K] as int8, by `absmax` [M] float32 or, if None, by each row's own.

    Returns:
        codes int8 [rows, columns], `limbs` rows per token, zero past K and anything past M tokens; their sums int32
        [rows, columns / unit]; float32 [M], what one step of a token's first limb is.
    """
    m, k = x.shape
    codes = x.new_empty(rows, columns, dtype=torch.int8)
    sums = x.new_empty(rows, columns // unit, dtype=torch.int32)
    steps = x.new_empty(m, dtype=torch.float32)
    # A product that is not rounded before it is added to would round to other integers than the CPU's.
    launch(
        ternary_kernels.quantise, (m,), x, absmax, codes, sums, steps, k, columns, x.stride(0),
        LIMBS=limbs, UNIT=unit, BLOCK=min(_MOST_QUANTISED, triton.next_power_of_2(columns)), num_warps=8,
        enable_fp_fusion=False,
    )  # fmt: skip
    return codes, sums, steps


def decompress(dense: torch.Tensor, words: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Fill dense [N, K] with the weight, rounded once to dense's dtype, or, if that is int8, with -1, 0, 1."""
    (n, k), (tiles, chunks), setting = dense.shape, words.shape[:2], launches(dense.device, "ternary")["decompress", 0]
    launch(
        ternary_kernels.decompress, (tiles, chunks // setting.groups), dense, words, scales,
        n, k, chunks, scales.shape[1], ROWS=TILE_ROWS, GROUPS=setting.groups, SCALED=scale_group(scales, chunks),
        CODES=dense.dtype == torch.int8, num_warps=setting.num_warps,
    )  # fmt: skip
    return dense


def _finish(
    partial: torch.Tensor,
    steps: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    limbs: int,
    scaled: bool,
) -> torch.Tensor:
    splits, rows, stride = partial.shape
    m, n = y.shape
    launch(
        ternary_kernels.finish, (m, triton.cdiv(n, _FINISH_BLOCK)), partial, steps, scales, bias, y,
        rows, n, stride, splits, LIMBS=limbs, SCALED=scaled, BLOCK=_FINISH_BLOCK, num_warps=4,
    )  # fmt: skip
    return y


def _fake(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    limbs: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    absmax: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


register(
    "ternary_triton_linear(Tensor x, Tensor words, Tensor scales, Tensor limbs, Tensor? bias, SymInt out_features, "
    "Tensor? absmax=None) -> Tensor",
    linear,
    _fake,
)
