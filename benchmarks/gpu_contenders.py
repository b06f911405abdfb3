"""Who takes part in gpu.py: our formats on Triton kernels, and torch's own products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

import sparse_backend as sb
from sparse_backend.formats import get_format
from sparse_backend.kernels import registry

Call = Callable[[torch.Tensor], torch.Tensor]


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def as_int8(x: torch.Tensor) -> torch.Tensor:
    """What int8 activations stand for, as transformers' activation_quant."""
    scale = 127 / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x.float() * scale).round().clamp(-128, 127) / scale


@dataclasses.dataclass
class Contender:
    """One way to compute a layer.

    Attributes:
        name: for the table.
        nbytes: of its weight, what a call reads.
        make: a call over a copy of the weight of its own.
        reference: the weight it stands for, [N, K].
        tolerance: of the norm of the error over the norm of the result: bf16 is off by 2e-3, interpreted 4e-3.
        prepare: what x becomes outside of the time that is measured.
        sees: the activations it computes with.
        problem: why it does not run here.
    """

    name: str
    nbytes: int = 0
    make: Callable[[], Call] | None = None
    reference: torch.Tensor | None = None
    tolerance: float = 6e-3
    prepare: Callable[[torch.Tensor], torch.Tensor] = same
    sees: Callable[[torch.Tensor], torch.Tensor] = same
    problem: str = ""


def copies(c: Contender, device: torch.device, timed: bool) -> list[Call]:
    """Calls over as many copies of its weight as are larger than the L2 cache together; one where nothing is timed."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if timed else 0
    return [c.make() for _ in range(min(48, max(2, -(-3 * l2 // c.nbytes))) if timed else 1)]


def random_weight(n: int, k: int, device: torch.device) -> torch.Tensor:
    return torch.randn(n, k, device=device, dtype=torch.float32).mul_(k**-0.5).bfloat16()


def pruned_nm(weight: torch.Tensor, few: int, of: int) -> torch.Tensor:
    """The `few` largest of every `of` columns."""
    groups = weight.view(weight.shape[0], -1, of)
    kept = groups.abs().float().topk(few, dim=2).indices
    return torch.zeros_like(groups).scatter_(2, kept, groups.gather(2, kept)).view(weight.shape)


def pruned(weight: torch.Tensor, share: float) -> torch.Tensor:
    return weight.masked_fill(torch.rand(weight.shape, device=weight.device) < share, 0)


def pruned_blocks(weight: torch.Tensor, share: float) -> torch.Tensor:
    n, k = weight.shape
    zero = torch.rand(n // 16, k // 16, device=weight.device) < share
    return weight.masked_fill(zero.repeat_interleave(16, 0).repeat_interleave(16, 1), 0)


def ternary(weight: torch.Tensor) -> torch.Tensor:
    return torch.randint_like(weight, -1, 2) * 0.0205


# name -> (zeros of a dense weight, options of a format)
OURS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], sb.Options]] = {
    "8:16 bf16 (50%)": (lambda w: pruned_nm(w, 8, 16), sb.Options(format="nm", pattern="8:16")),
    "8:16 int8 (50%)": (lambda w: pruned_nm(w, 8, 16), sb.Options(format="nm", pattern="8:16", values="int8")),
    "8:16 int4 (50%)": (lambda w: pruned_nm(w, 8, 16), sb.Options(format="nm", pattern="8:16", values="int4")),
    "4:16 bf16 (75%)": (lambda w: pruned_nm(w, 4, 16), sb.Options(format="nm", pattern="4:16")),
    "sell bf16 (90%)": (lambda w: pruned(w, 0.9), sb.Options(format="sell")),
    "ternary 2-bit, int8 x": (ternary, sb.Options(format="ternary", bits=2, activations="int8")),
    "ternary 2-bit, bf16 x": (ternary, sb.Options(format="ternary", bits=2)),
    "block bf16 (50%)": (lambda w: pruned_blocks(w, 0.5), sb.Options(format="block")),
}


def ours(name: str, weight: torch.Tensor) -> Contender:
    zeros, options = OURS[name]
    packed = get_format(str(options.format)).pack(zeros(weight).cpu(), options)
    lowered = packed.lower("cuda")
    row, n = registry.kernel(lowered.format, "cuda"), weight.shape[0]

    def make() -> Call:
        tensors = [t.clone() for t in lowered.tensors.values()]
        return lambda x: row.call(x, tensors, None, n)

    sees = as_int8 if options.activations == "int8" else same
    return Contender(name, lowered.nbytes, make, packed.unpack().to(weight.device), sees=sees)


def dense(weight: torch.Tensor) -> Contender:
    def make() -> Call:
        w = weight.clone()
        return lambda x: F.linear(x, w)

    return Contender("cuBLAS bf16", weight.nbytes, make, weight)


def fp8(weight: torch.Tensor) -> Contender:
    """Dense FP8 with a scale per row and token; x is rounded before the time that is measured, in its favour."""
    scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)

    def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        step = x.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
        return (x.float() / step).to(torch.float8_e4m3fn), step

    given: dict[str, torch.Tensor] = {}

    def prepare(x: torch.Tensor) -> torch.Tensor:
        q, given["step"] = rounded(x)
        return q

    def sees(x: torch.Tensor) -> torch.Tensor:
        q, step = rounded(x)
        return q.float() * step

    def make() -> Call:
        w, s = codes.clone(), scale.T.contiguous()
        return lambda q: torch._scaled_mm(q, w.t(), scale_a=given["step"], scale_b=s, out_dtype=torch.bfloat16)

    return Contender("FP8 dense (x in FP8)", codes.nbytes, make, codes.float() * scale, 1e-2, prepare, sees)


def semi_structured(weight: torch.Tensor) -> Contender:
    if not weight.is_cuda:
        raise RuntimeError("runs on GPUs only")
    kept = pruned_nm(weight, 2, 4)
    sparse = torch.sparse.to_sparse_semi_structured(kept)

    def make() -> Call:
        w = torch.sparse.to_sparse_semi_structured(kept)
        return lambda x: F.linear(x, w)

    F.linear(weight.new_zeros(1, weight.shape[1]), sparse)
    return Contender("2:4 bf16 (torch)", weight.nbytes * 9 // 16, make, kept)


def int4(weight: torch.Tensor) -> Contender:
    """Weight-only int4 in groups of 128, bf16 activations."""
    n, k = weight.shape
    groups = weight.float().view(n, -1, 128)
    scale = (groups.abs().amax(2) / 7).clamp_min(1e-12).bfloat16()
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7).view(n, k)
    stored = (codes + 8).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack((stored[:, ::2] << 4) | stored[:, 1::2], 8)
    both = torch.stack((scale, torch.zeros_like(scale)), dim=2).transpose(0, 1).contiguous()

    def make() -> Call:
        w, s = packed.clone(), both.clone()
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, w, 128, s)

    reference = (codes.view(n, -1, 128) * scale.float()[..., None]).view(n, k)
    return Contender("int4 (torch)", n * k // 2 + both.nbytes, make, reference)


PEERS: dict[str, Callable[[torch.Tensor], Contender]] = {
    "cuBLAS bf16": dense, "FP8 dense (x in FP8)": fp8, "2:4 bf16 (torch)": semi_structured, "int4 (torch)": int4,
}  # fmt: skip


def contender(name: str, weight: torch.Tensor) -> Contender:
    """One by its name; one that cannot be had here says why."""
    if name in OURS:
        return ours(name, weight)
    try:
        found = PEERS[name](weight)
        assert found.make is not None
        found.make()(found.prepare(weight.new_ones(1, weight.shape[1])))
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        return Contender(name, problem=f"does not run here: {(str(error).splitlines() or ['no reason given'])[0][:80]}")
    return found
