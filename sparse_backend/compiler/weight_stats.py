"""What one weight matrix holds: magnitudes, zeros and their patterns, values, rank. Nothing here sees a checkpoint.

Everything works in chunks of rows, so that a matrix of any size needs little memory beside its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from ..errors import WeightError
from ..formats.ternary import Ternary
from ..options import Options

THRESHOLDS = (0.001, 0.005, 0.01, 0.02)
PRUNED_SHARES = (0.3, 0.5, 0.7, 0.9)
BLOCKS = (4, 16, 32)
NM_PATTERNS = ((2, 4), (8, 16))
RANKS = (32, 128, 512)
# Histogram of magnitudes: quarters of an octave, linear in the mantissa, from 2^-24; below and above go to the ends.
FIRST_OCTAVE, OCTAVES = -24, 30
SKETCH = 1 << 16
MAX_DISTINCT = 1 << 16

_CHUNK = 1 << 19  # weights counted at once: temporaries stay in the cache
_PRODUCT_CHUNK = 1 << 22  # weights multiplied at once: 16 MB as float32
_PATTERNS = 1 << 16  # of 16 bits
# Up to this smaller side all eigenvalues cost no more than the product they are those of.
_EXACT_RANK = 4096
_OVERSAMPLING = 64


@dataclasses.dataclass(frozen=True)
class MatrixStats:
    """One weight [N, K]. Shares are of all its weights; None where there is nothing to take a share of.

    Attributes:
        shape: (N, K).
        dtype: of the checkpoint, or the one its values were found to fit in.
        nonfinite: NaN and Inf weights; sums and ranks leave them out.
        zeros: weights that are +0.0 or -0.0.
        below: weights of magnitude below each of THRESHOLDS.
        distinct: different values (0.0 and -0.0 are one); None for more than MAX_DISTINCT.
        exponent_bits: width of the dtype's exponent field.
        exponent_entropy: Shannon entropy of that field, bits per weight.
        kept: for each of PRUNED_SHARES, the share of sum |w| and of sum w^2 left when the smallest weights of the
            whole matrix go. Exact for 16-bit weights; for float32, to the 7 bits of mantissa of its histogram.
        zero_blocks: per size of BLOCKS, (blocks of zeros only, whole blocks).
        nm: per (N, M) of NM_PATTERNS, (groups of M columns with at most N nonzeros, whole groups).
        ternary: None, or the scale's granularity: `tensor`, `row`, or `group of 128` (256, 64, 32).
        energy: per rank of RANKS, the share of sum w^2 in that many singular values; None if not asked for.
        energy_exact: False where `energy` is a lower bound (smaller side above 4096).
        octaves: weights per quarter octave of magnitude; zeros are left out.
    """

    shape: tuple[int, int]
    dtype: str
    nonfinite: int
    zeros: int
    below: tuple[int, ...]
    distinct: int | None
    exponent_bits: int
    exponent_entropy: float | None
    kept: tuple[tuple[float, float] | None, ...]
    zero_blocks: tuple[tuple[int, int], ...]
    nm: tuple[tuple[int, int], ...]
    ternary: str | None
    energy: tuple[float | None, ...] | None
    energy_exact: bool
    octaves: torch.Tensor

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def density(self) -> float:
        """Share of weights that are not zero; 1.0 of an empty matrix."""
        return 1 - self.zeros / self.parameters if self.parameters else 1.0


def measure(weight: torch.Tensor, rank: bool = True) -> MatrixStats:
    """Everything about one weight.

    Args:
        weight: [N, K], bfloat16, float16 or float32.
        rank: also the energy at RANKS, which takes most of the time.
    """
    weight = weight.contiguous()
    narrow = weight.dtype != torch.float32 or _fits_bfloat16(weight)
    dtype = torch.bfloat16 if narrow and weight.dtype == torch.float32 else weight.dtype
    spectrum = _Spectrum.of(weight, dtype)
    zeros = int(spectrum.count[0]) if narrow else _count(weight, 0.0, equal=True)
    return MatrixStats(
        shape=(weight.shape[0], weight.shape[1]),
        dtype=str(dtype).removeprefix("torch."),
        nonfinite=spectrum.nonfinite,
        zeros=zeros,
        below=tuple(spectrum.below(t) if narrow else _count(weight, t) for t in THRESHOLDS),
        distinct=spectrum.distinct if narrow else _distinct(weight),
        exponent_bits=5 if dtype == torch.float16 else 8,
        exponent_entropy=spectrum.exponent_entropy(),
        kept=tuple(spectrum.kept(share) for share in PRUNED_SHARES),
        **_zero_structure(weight, zeros),
        ternary=_ternary(weight) if spectrum.nonfinite == 0 else None,
        energy=_energy(weight, spectrum) if rank else None,
        energy_exact=min(weight.shape) <= _EXACT_RANK,
        octaves=spectrum.octaves(),
    )


def sketch(weight: torch.Tensor) -> torch.Tensor:
    """Weights at up to SKETCH fixed positions, [SKETCH] or [N * K], of the weight's dtype; NaN and Inf become 0.

    The positions are drawn once for each size, with replacement, so cosines of sketches estimate those of the
    matrices, with a standard error of at most 1 / sqrt(SKETCH) = 0.004 for weights without heavy tails. Equal
    matrices have equal sketches; of matrices no larger than a sketch all weights are taken.
    """
    flat = weight.reshape(-1)
    if flat.numel() > SKETCH:
        generator = torch.Generator().manual_seed(flat.numel())
        flat = flat[torch.randint(flat.numel(), (SKETCH,), generator=generator)]
    return flat.nan_to_num(0.0, 0.0, 0.0)


def octave_bins() -> tuple[torch.Tensor, torch.Tensor]:
    """Of `MatrixStats.octaves`: the middle of each bin (a magnitude), and its width in octaves; float64."""
    quarter = torch.arange(4, dtype=torch.float64)
    octave = torch.arange(FIRST_OCTAVE, FIRST_OCTAVE + OCTAVES, dtype=torch.float64)
    centers = 2 ** octave.unsqueeze(1) * (1 + (quarter + 0.5) / 4)
    return centers.view(-1), ((5 + quarter) / (4 + quarter)).log2().repeat(OCTAVES)


def cosines(sketches: list[torch.Tensor]) -> torch.Tensor:
    """Cosine similarity [n, n] float32 of n sketches of one size; 0 with a sketch of zeros."""
    if not sketches or sketches[0].numel() == 0:
        return torch.zeros(len(sketches), len(sketches))
    units = torch.stack([torch.nn.functional.normalize(s.double(), dim=0).float() for s in sketches])
    return (units @ units.T).clamp_(-1, 1)


def _chunks(weight: torch.Tensor, chunk: int = _CHUNK) -> Iterator[torch.Tensor]:
    """Rows in turn, a multiple of 32 of them."""
    rows = max(32, chunk // max(1, weight.shape[1]) // 32 * 32)
    for start in range(0, weight.shape[0], rows):
        yield weight[start : start + rows]


def _fits_bfloat16(weight: torch.Tensor) -> bool:
    """Whether a float32 weight was stored as bfloat16 once: the lower halves are all zero."""
    return all(not (chunk.view(torch.int32) & 0xFFFF).any() for chunk in _chunks(weight))


def _count(weight: torch.Tensor, threshold: float, equal: bool = False) -> int:
    """Magnitudes below a threshold, or equal to it."""
    return sum(int((c.abs() == threshold if equal else c.abs() < threshold).sum()) for c in _chunks(weight))


def _distinct(weight: torch.Tensor) -> int | None:
    """Different values of a float32 weight; None as soon as they are more than MAX_DISTINCT."""
    seen = weight.new_empty(0)
    for chunk in _chunks(weight, 4 * MAX_DISTINCT):
        seen = torch.unique(torch.cat([seen, chunk.reshape(-1) + 0.0]))
        if seen.numel() > MAX_DISTINCT:
            return None
    return seen.numel()


@dataclasses.dataclass(frozen=True)
class _Spectrum:
    """How many weights have each magnitude, from the smallest to the largest.

    16-bit patterns without the sign order like magnitudes, so counting patterns is all of sorting. A float32
    weight is counted by its upper half, and `value` is then the middle of what falls together.
    """

    value: torch.Tensor  # float64, finite ones only
    count: torch.Tensor  # int64
    exponents: torch.Tensor  # int64: weights per value of the exponent field
    nonfinite: int
    distinct: int

    @classmethod
    def of(cls, weight: torch.Tensor, dtype: torch.dtype) -> _Spectrum:
        signed = torch.zeros(_PATTERNS, dtype=torch.int64)
        for chunk in _chunks(weight):
            if weight.dtype == torch.float32:
                patterns = chunk.view(torch.int32).reshape(-1) >> 16
            else:
                patterns = chunk.view(torch.int16).reshape(-1).int()
            patterns += _PATTERNS // 2  # sign bit set: the lower half
            signed += torch.bincount(patterns, minlength=_PATTERNS)
        negative, positive = signed.view(2, -1)
        count = negative + positive
        if dtype == torch.float32:
            value = ((torch.arange(_PATTERNS // 2, dtype=torch.int32) << 16) + (1 << 15)).view(torch.float32).double()
            value[0] = 0.0
        else:
            value = torch.arange(_PATTERNS // 2, dtype=torch.int16).view(dtype).double()
        finite = value.isfinite()
        distinct = int((negative[1:] > 0).sum() + (positive[1:] > 0).sum()) + int(count[0] > 0)
        mantissa = 10 if dtype == torch.float16 else 7
        return cls(
            value[finite], count[finite], count.view(-1, 1 << mantissa).sum(1), int(count[~finite].sum()), distinct
        )

    def below(self, threshold: float) -> int:
        """Weights of smaller magnitude."""
        return int(self.count[self.value < threshold].sum())

    def exponent_entropy(self) -> float | None:
        """Bits per weight."""
        total = int(self.exponents.sum())
        if not total:
            return None
        p = self.exponents[self.exponents > 0].double() / total
        return float(-(p * p.log2()).sum()) + 0.0

    def energy(self) -> float:
        """The sum of squares."""
        return float((self.count * self.value**2).sum())

    def kept(self, share: float) -> tuple[float, float] | None:
        """Shares of sum |w| and sum w^2 without the smallest weights."""
        counts = self.count.cumsum(0)
        drop = round(share * int(counts[-1]))
        bin = int(torch.searchsorted(counts, drop))
        rest = drop - int(counts[bin] - self.count[bin])  # of this bin's weights, the ones that go
        out = []
        for sums in (self.count * self.value, self.count * self.value**2):
            total = float(sums.sum())
            if not 0 < total < math.inf:
                return None
            dropped = float(sums[:bin].sum()) + (rest * float(sums[bin]) / int(self.count[bin]) if rest else 0.0)
            out.append(1 - dropped / total)
        return out[0], out[1]

    def octaves(self) -> torch.Tensor:
        """Weights per quarter octave, int64 [4 * OCTAVES]."""
        present = (self.count > 0) & (self.value > 0)
        mantissa, exponent = torch.frexp(self.value[present])  # 0.5 <= mantissa < 1
        index = (exponent - 1 - FIRST_OCTAVE) * 4 + ((mantissa - 0.5) * 8).int()
        out = torch.zeros(4 * OCTAVES, dtype=torch.int64)
        return out.index_add_(0, index.clamp(0, 4 * OCTAVES - 1).int(), self.count[present])


def _zero_structure(weight: torch.Tensor, zeros: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """`zero_blocks` and `nm`. Rows and columns at the edges that fill no block or group are left out."""
    n, k = weight.shape
    blocks, groups = dict.fromkeys(BLOCKS, 0), dict.fromkeys(NM_PATTERNS, 0)
    for chunk in _chunks(weight) if zeros else ():  # most models hold none
        # Nonzeros of 4 columns, then of 16: bytes are added in one multiplication, the sum is the highest byte.
        of_4 = _byte_sums((chunk != 0)[:, : k // 4 * 4])
        of_16 = _byte_sums(of_4[:, : k // 16 * 4])
        groups[2, 4] += int((of_4 <= 2).sum())
        groups[8, 16] += int((of_16 <= 8).sum())
        blocks[4] += _zero_blocks(of_4, 4, 1)
        blocks[16] += _zero_blocks(of_16, 16, 1)
        blocks[32] += _zero_blocks(of_16, 32, 2)
    return {
        "zero_blocks": tuple((blocks[size], (n // size) * (k // size)) for size in BLOCKS),
        "nm": tuple((groups[pattern], n * (k // pattern[1])) for pattern in NM_PATTERNS),
    }


def _byte_sums(values: torch.Tensor) -> torch.Tensor:
    """Sums of 4 neighbouring columns, uint8 [n, k / 4], of bool or uint8 [n, k] whose sums fit."""
    words = values.reshape(-1).view(torch.uint8).view(torch.int32).view(values.shape[0], values.shape[1] // 4)
    return (words * 0x01010101 >> 24).to(torch.uint8)


def _zero_blocks(counts: torch.Tensor, rows: int, columns: int) -> int:
    """Blocks of so many rows and columns of `counts` that are all zero."""
    n, k = counts.shape[0] // rows, counts.shape[1] // columns
    tiles = counts[: n * rows, : k * columns].reshape(n, rows, k, columns)
    return int((tiles.amax(dim=(1, 3)) == 0).sum()) if tiles.numel() else 0


def _ternary(weight: torch.Tensor) -> str | None:
    """The coarsest granularity of scales under which the weight is -1, 0, 1 times a scale."""
    if weight.numel() == 0:
        return None
    finest, scales, rows = 0, set(), False
    for chunk in _chunks(weight):
        try:
            packed = Ternary().pack(chunk, Options(format="ternary"))
        except WeightError:
            return None
        group_size = packed.attributes["group_size"]
        if group_size:
            finest = min(finest or group_size, group_size)
        found = packed.tensors["scales"]
        rows = rows or found.numel() > 1
        scales.add(float(found.max()))
    if finest:
        return f"group of {finest}"
    return "row" if rows or len(scales - {0.0}) > 1 else "tensor"


def _energy(weight: torch.Tensor, spectrum: _Spectrum) -> tuple[float | None, ...]:
    """Shares of sum w^2 in the largest RANKS singular values."""
    total = spectrum.energy()
    if not 0 < total < math.inf:
        return (None,) * len(RANKS)
    # Squares of the largest magnitude must fit float32.
    scale = min(1e38, 1 / float(spectrum.value[spectrum.count > 0].max()))
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    exact = tall.shape[1] <= _EXACT_RANK
    squares = _all_squares(tall, scale) if exact else _large_squares(tall, scale)
    sums = squares.double().clamp_(min=0).cumsum(0)
    whole = float(sums[-1]) if exact else total * scale**2
    return tuple(min(1.0, float(sums[min(r, len(sums)) - 1]) / whole) for r in RANKS)


def _float_chunks(tall: torch.Tensor, scale: float) -> Iterator[torch.Tensor]:
    for chunk in _chunks(tall, _PRODUCT_CHUNK):
        yield chunk.to(torch.float32, copy=True).nan_to_num_(0.0, 0.0, 0.0).mul_(scale)


def _all_squares(tall: torch.Tensor, scale: float) -> torch.Tensor:
    """Squared singular values, largest first: the eigenvalues of W^T W, whose upper triangle alone is computed."""
    k = tall.shape[1]
    gram = torch.zeros(k, k)
    step = max(64, k // 8)
    for x in _float_chunks(tall, scale):
        for i in range(0, k, step):
            gram[i : i + step, i:].addmm_(x[:, i : i + step].T, x[:, i:])
    squares: torch.Tensor = torch.linalg.eigvalsh(gram, UPLO="U")
    return squares.flip(0)


def _large_squares(tall: torch.Tensor, scale: float) -> torch.Tensor:
    """Lower bounds of the largest squared singular values, by randomized SVD with one power iteration.

    Halko, Martinsson, Tropp, 2011. Three products in all: exact for what decays quickly, about a tenth too low
    where the spectrum is flat.
    """
    width = max(RANKS) + _OVERSAMPLING
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(tall.shape[1], width, generator=generator)
    left = torch.linalg.qr(torch.cat([x @ right for x in _float_chunks(tall, scale)])).Q
    back, start = torch.zeros_like(right), 0
    for x in _float_chunks(tall, scale):
        back.addmm_(x.T, left[start : start + len(x)])
        start += len(x)
    right = torch.linalg.qr(back).Q
    gram = torch.zeros(width, width)
    for x in _float_chunks(tall, scale):
        y = x @ right
        gram.addmm_(y.T, y)
    squares: torch.Tensor = torch.linalg.eigvalsh(gram)
    return squares.flip(0)
