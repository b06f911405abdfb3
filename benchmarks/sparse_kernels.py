"""The contest of `kernels.py --format sparse`: unstructured zeros, every kind of values, many peers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import machine
import torch
from contest import Call, Contender, console, dense_peers, fastest, measure
from rich.table import Table
from shapes import SHAPES

import sparse_backend as sb
from sparse_backend.kernels import registry

# (format, values, activations) of ours; the last three store every weight, zeros too.
OURS = (
    *((form, values, "keep") for form in ("bitmask", "sell") for values in ("bf16", "bf16x12", "int8", "int4")),
    ("bitmask", "int8", "int8"), ("bitmask", "int4", "int8"),
    ("bf16x12", "bf16x12", "keep"), ("int8", "int8", "keep"), ("int4", "int4", "keep"),
)  # fmt: skip
DENSE = ("F.linear", "onednn_mm")


def name_of(form: str, values: str, activations: str) -> str:
    name = form if form == values else f"{form} {values}"
    return name if activations == "keep" else f"{name}, int8 activations"


def ours(weight: torch.Tensor, form: str, values: str, activations: str = "keep") -> Contender:
    more = {"activations": activations} if activations != "keep" else {}
    packed = sb.pack(weight, format=form, values=None if form == values else values, **more)
    contender = machine_contender(name_of(form, values, activations), packed.lower())
    if values in ("int8", "int4"):
        contender.reference = packed.unpack()
    return contender


def machine_contender(name: str, weight: sb.MachineWeight) -> Contender:
    """A format of ours, over copies of its machine form in huge pages."""
    row, n = registry.kernel(weight.format), weight.shape[0]

    def call() -> Call:
        tensors = [machine.huge(torch.empty_like(t)).copy_(t) for t in weight.tensors.values()]
        return lambda x: row.call(x, tensors, None, n)

    return Contender(name, call, weight.nbytes)


def quantised_peers(weight: torch.Tensor) -> list[Contender]:
    """Dense low-bit products of torch and vLLM; those that do not run here are named."""
    scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-9) / 127
    codes = (weight.float() / scale).round().to(torch.int8)
    rounded = (codes * scale).bfloat16()
    n, k = weight.shape

    def torch_int8() -> Call:
        w, s = codes.clone(), scale.view(-1).bfloat16()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, w, s)

    def vllm_int8() -> Call:
        import vllm._custom_ops as ops

        scales = scale.clone()  # the handle keeps a pointer to it: `call` must keep it alive
        handle = ops.create_onednn_scaled_mm(codes.t(), scales, torch.bfloat16, True, False, 32)

        def call(x: torch.Tensor, _alive: torch.Tensor = scales) -> torch.Tensor:
            q, s, zero = ops.onednn_scaled_int8_quant(x, None, None, True)
            return ops.onednn_scaled_mm(handle, q, x.new_empty(x.shape[0], n), s, zero, None, None)

        return call

    group = 128
    parts = weight.float().view(n, -1, group)
    scale4 = parts.abs().amax(2).clamp_min(1e-9) / 7
    codes4 = (parts / scale4[..., None]).round().clamp(-7, 7).view(n, k)
    rounded4 = (codes4.view(n, -1, group) * scale4[..., None]).view(n, k).bfloat16()

    def torch_int4() -> Call:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes4 + 8).to(torch.int32), 1)
        both = torch.stack((scale4, torch.zeros_like(scale4)), dim=2).transpose(0, 1).contiguous().bfloat16()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, both)

    found = []
    peers: list[tuple[str, Callable[[], Call], int, torch.Tensor]] = [
        ("torch int8 weights", torch_int8, n * k, rounded),
        ("vLLM int8 (onednn)", vllm_int8, n * k, rounded),
        ("torch int4 weights", torch_int4, n * k // 2 + n * k // group * 4, rounded4),
    ]
    for name, make, nbytes, reference in peers:
        try:
            make()(torch.zeros(1, k, dtype=torch.bfloat16))
            contender = Contender(name, make, nbytes)
            contender.reference = reference
            found.append(contender)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            console.print(f"{name} does not run here: {str(error).splitlines()[0][:90]}", highlight=False)
    return found


def csr_peers(weight: torch.Tensor) -> list[Contender]:
    """What a library's sparse matrix gives: fp32 values, 32-bit columns; scipy's runs on one thread."""
    import scipy.sparse

    wide = weight.float().to_sparse_csr()
    # MKL takes 32 bits: 64 would be converted at every call.
    csr = torch.sparse_csr_tensor(wide.crow_indices().int(), wide.col_indices().int(), wide.values(), wide.shape)
    nbytes = csr.values().nbytes + csr.col_indices().nbytes + csr.crow_indices().nbytes

    def torch_csr() -> Call:
        w = csr.clone()
        return lambda x: (w @ x.float().t()).t().to(x.dtype)

    theirs = scipy.sparse.csr_array(weight.float().numpy())
    scipy_bytes = theirs.data.nbytes + theirs.indices.nbytes + theirs.indptr.nbytes

    def scipy_csr() -> Call:
        w = theirs.copy()
        return lambda x: torch.from_numpy((w @ x.float().t().numpy()).T).to(x.dtype)

    return [
        Contender("torch.sparse CSR", torch_csr, nbytes),
        Contender("scipy CSR", scipy_csr, scipy_bytes),
    ]


def contenders(weight: torch.Tensor, args: argparse.Namespace) -> list[Contender]:
    chosen = [one for one in OURS if not args.ours or one[0] in args.ours or name_of(*one) in args.ours]
    out = [ours(weight, *one) for one in chosen] + dense_peers(weight)
    if args.no_peers:
        return out
    zeros = 1 - int(torch.count_nonzero(weight)) / weight.numel()
    # CSR of a dense matrix is six times its size, and nobody's choice.
    return out + quantised_peers(weight) + (csr_peers(weight) if zeros > 0.25 else [])


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    bandwidth = machine.Bandwidth()
    rows: list[dict[str, Any]] = []
    for shape_name in args.shapes:
        n, k = SHAPES[shape_name]
        for zeros in args.zeros:
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(n, k, generator=generator)
            weight[torch.rand(n, k, generator=generator) < zeros] = 0
            weight = weight.bfloat16()
            group = contenders(weight, args)
            for batch in args.batch:
                x = torch.randn(batch, k, generator=generator).bfloat16()
                exact = x.float() @ weight.float().t()
                for c in group:
                    c.problem = ""
                    c.check(x, exact if c.reference is None else x.float() @ c.reference.float().t())
                probes = [bandwidth.read_once(args.threads[0])]
                measure(group, x, args.seconds)
                probes.append(bandwidth.read_once(args.threads[0]))
                rows += report(shape_name, weight, zeros, batch, args.threads[0], group, max(probes))
            del group
    return rows


def report(
    shape: str, weight: torch.Tensor, zeros: float, batch: int, threads: int, group: list[Contender], gbs: float
) -> list[dict[str, Any]]:
    n, k = weight.shape
    limit = weight.nbytes / gbs / 1e9
    best_dense = fastest(group, DENSE)
    table = Table(
        "", "ms", "GB/s", "bits/weight", "over best dense", "over dense byte limit",
        title=f"{shape} {n}x{k}, {zeros:.0%} zeros, batch {batch}, {threads} thread(s); memory reads {gbs:.1f} GB/s, "
        f"dense byte limit {limit * 1e3:.2f} ms", title_justify="left",
    )  # fmt: skip
    rows = []
    for c in group:
        bits = 8 * c.nbytes / (n * k)
        if c.problem:
            table.add_row(c.name, c.problem, "", f"{bits:.2f}", "", "")
            continue
        row = {
            "shape": shape, "n": n, "k": k, "zeros": zeros, "batch": batch, "threads": threads, "kernel": c.name,
            "ms": c.seconds * 1e3, "gb_per_s": c.nbytes / c.seconds / 1e9, "bits_per_weight": bits,
            "over_best_dense": best_dense / c.seconds, "over_dense_byte_limit": limit / c.seconds,
            "read_gb_per_s": gbs, "runs": len(c.times),
        }  # fmt: skip
        rows.append(row)
        table.add_row(
            c.name, f"{row['ms']:.3f}", f"{row['gb_per_s']:.1f}", f"{bits:.2f}",
            f"{row['over_best_dense']:.2f}", f"{row['over_dense_byte_limit']:.2f}",
        )  # fmt: skip
    console.print(table)
    return rows
