"""Ternary layers against llama.cpp's TQ2_0 and TQ1_0, F.linear and onednn_mm: kernels.py --format ternary."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import ggml_peer
import machine
import torch
from contest import Call, Contender, console, dense_peers, fastest, measure
from rich.table import Table
from shapes import SHAPES

from sparse_backend import pack
from sparse_backend.kernels import cpu

# name -> options of sb.pack
OURS: dict[str, dict[str, Any]] = {
    "2 bits, int8": {"bits": 2, "activations": "int8"},
    "1.6 bits, int8": {"bits": 1.6, "activations": "int8"},
    "2 bits, keep": {"bits": 2, "activations": "keep"},
    "2 bits, int8, group 128": {"bits": 2, "activations": "int8", "group_size": 128},
    "int8 weights": {"format": "int8"},  # what option lm_head makes of the output head
}


def ternary_weight(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-1, 2, (n, k), generator=generator).bfloat16() * 0.0205


def contenders(weight: torch.Tensor, peers: bool) -> list[Contender]:
    n, k = weight.shape
    op = cpu.ops().lowbit_linear.default
    out = []
    for name, options in OURS.items():
        grouped = weight.clone()
        if "group_size" in options:  # another scale per group, or pack() would find there is only one
            grouped.view(n, -1, options["group_size"])[:, ::2] *= 2
        packed = pack(grouped, **{"format": "ternary", **options})
        lowered = packed.lower()

        def ours(packed: Any = packed) -> Call:
            buffer, scales = packed._format().lower(packed).tensors.values()
            return lambda x: op(x, buffer, scales, None, n)

        contender = Contender(name, ours, lowered.nbytes)
        contender.reference = grouped if "group_size" in options else None
        out.append(contender)
    dense = dense_peers(weight)
    why = ggml_peer.available()
    if why is not None:
        console.print(f"llama.cpp is not measured: {why}", highlight=False)
    if not peers or why is not None:
        return out + dense
    ggml = ggml_peer.Ggml()
    for name in ggml_peer.TERNARY_TYPES:
        data, kind = ggml_peer.quantised(weight, name)
        out.append(Contender(name, partial(ggml_peer.MatMul, ggml, data, kind, n, k), data.nbytes))
    return out + dense


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    bandwidth = machine.Bandwidth()
    rows: list[dict[str, Any]] = []
    (threads,) = args.threads
    for shape in args.shapes:
        n, k = SHAPES[shape]
        generator = torch.Generator().manual_seed(0)
        weight = ternary_weight(n, k, generator)
        group = contenders(weight, not args.no_peers)
        for batch in args.batch:
            x = torch.randn(batch, k, generator=generator).bfloat16()
            expected = x.double() @ weight.double().t()
            for c in group:
                c.problem = ""
                c.check(x, expected if c.reference is None else x.double() @ c.reference.double().t())
            probes = [bandwidth.read_once(threads)]
            measure(group, x, args.seconds)
            probes.append(bandwidth.read_once(threads))
            rows += report(shape, (n, k), batch, threads, group, max(probes))
    return rows


def report(
    shape: str, size: tuple[int, int], batch: int, threads: int, group: list[Contender], gbs: float
) -> list[dict[str, Any]]:
    n, k = size
    dense, tq2 = fastest(group, ("F.linear", "onednn_mm")), fastest(group, ("TQ2_0",))
    table = Table(
        "", "ms", "GB/s", "of read GB/s", "T int-op/s", "bits/weight", "over best dense", "over TQ2_0",
        title=f"{shape} {n}x{k}, ternary, batch {batch}, {threads} thread(s); memory reads {gbs:.1f} GB/s",
        title_justify="left",
    )  # fmt: skip
    rows = []
    for c in group:
        if c.problem:
            table.add_row(c.name, c.problem, "", "", "", "", "", "")
            continue
        row = {
            "shape": shape, "n": n, "k": k, "batch": batch, "threads": threads, "kernel": c.name,
            "ms": c.seconds * 1e3, "gb_per_s": c.nbytes / c.seconds / 1e9,
            "of_read": c.nbytes / c.seconds / 1e9 / gbs, "tops": 2 * n * k * batch / c.seconds / 1e12,
            "bits_per_weight": 8 * c.nbytes / (n * k), "over_best_dense": dense / c.seconds,
            "over_tq2_0": tq2 / c.seconds, "read_gb_per_s": gbs, "runs": len(c.times),
        }  # fmt: skip
        rows.append(row)
        table.add_row(
            c.name, f"{row['ms']:.3f}", f"{row['gb_per_s']:.1f}", f"{row['of_read']:.0%}", f"{row['tops']:.3f}",
            f"{row['bits_per_weight']:.3f}", f"{row['over_best_dense']:.2f}", f"{row['over_tq2_0']:.2f}",
        )  # fmt: skip
    console.print(table)
    return rows
