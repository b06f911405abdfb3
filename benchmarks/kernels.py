"""Kernel speeds against peers: `make bench`, or python benchmarks/kernels.py --help.

For each shape, density, batch and thread count: our kernel, F.linear, vLLM's prepacked
onednn_mm, torch.sparse CSR, and the time the machine's memory needs for the dense bytes; with
--format ternary against llama.cpp's TQ2_0 and TQ1_0 (ternary_kernels.py). contest.py has the rules.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import machine
import ternary_kernels
import torch
import torch.nn.functional as F
from contest import Call, Contender, console, copies, dense_peers, fastest, measure
from rich.table import Table
from shapes import SHAPES

import sparse_backend as sb
from sparse_backend.kernels import cpu


def contenders(weight: torch.Tensor, peers: bool) -> list[Contender]:
    n = weight.shape[0]
    packed = sb.pack(weight)
    lowered = packed.lower()
    op = torch.ops.sparse_backend.bitmask_linear

    def ours() -> Call:
        buffer = packed._format().lower(packed).tensors["packed"]
        return lambda x: op(x, buffer, None, n)

    out = [Contender("bitmask", copies(lowered.nbytes, ours), lowered.nbytes)]
    dense = dense_peers(weight)
    if not peers:
        return [*out, dense[0]]
    out += dense
    csr = weight.float().to_sparse_csr()
    nbytes = csr.values().nbytes + csr.col_indices().nbytes + csr.crow_indices().nbytes

    def sparse() -> Call:
        w = csr.clone()
        return lambda x: (w @ x.float().t()).t().to(x.dtype)

    out.append(Contender("torch.sparse CSR", copies(nbytes, sparse), nbytes))
    return out


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
            group = contenders(weight, not args.no_peers)
            for batch in args.batch:
                x = torch.randn(batch, k, generator=generator).bfloat16()
                expected = x.double() @ weight.double().t()
                for c in group:
                    c.problem = ""
                    c.check(x, expected)
                for threads in args.threads:
                    torch.set_num_threads(threads)
                    probes = [bandwidth.read_once(threads)]
                    measure(group, x, args.seconds)
                    probes.append(bandwidth.read_once(threads))
                    rows += report(shape_name, weight, zeros, batch, threads, group, max(probes))
    return rows


def report(
    shape: str, weight: torch.Tensor, zeros: float, batch: int, threads: int, group: list[Contender], gbs: float
) -> list[dict[str, Any]]:
    n, k = weight.shape
    limit = weight.nbytes / gbs / 1e9
    best_dense = fastest(group, ("F.linear", "onednn_mm"))
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


def overhead() -> dict[str, float]:
    """Microseconds per call of a 64x64 layer: the plugin's own cost beside F.linear's."""
    weight = torch.randn(64, 64).masked_fill_(torch.rand(64, 64) < 0.5, 0).bfloat16()
    layer = sb.SparseLinear(sb.pack(weight).lower())
    (buffer,) = layer.machine_weight().tensors.values()
    op, x = cpu.ops().bitmask_linear.default, torch.randn(1, 64).bfloat16()
    calls: dict[str, Callable[[], object]] = {
        "F.linear": lambda: F.linear(x, weight),
        "bitmask op (as the engines call it)": lambda: op(x, buffer, None, 64),
        "SparseLinear": lambda: layer(x),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(60):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(200):
                call()
            times[name].append((time.perf_counter() - start) / 200 * 1e6)
    return {name: statistics.median(t) for name, t in times.items()}


def packing() -> dict[str, float]:
    weight = torch.randn(17408, 5120).masked_fill_(torch.rand(17408, 5120) < 0.5, 0).bfloat16()
    times: dict[str, list[float]] = {"pack": [], "lower": [], "unpack": []}
    for _ in range(3):
        start = time.perf_counter()
        packed = sb.pack(weight)
        times["pack"].append(time.perf_counter() - start)
        start = time.perf_counter()
        packed.lower()
        times["lower"].append(time.perf_counter() - start)
        start = time.perf_counter()
        dense = packed.unpack()
        times["unpack"].append(time.perf_counter() - start)
        assert torch.equal(dense, weight)
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(SHAPES)
    parser.add_argument("--shapes", nargs="+", choices=names, default=names[:2], metavar="NAME", help=", ".join(names))
    parser.add_argument("--format", choices=("bitmask", "ternary"), default="bitmask")
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.5, 0.7, 0.9], help="shares of zeros")
    parser.add_argument("--batch", nargs="+", type=int, help="default: 1 8 64; ternary 1 8 128 512")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--seconds", type=float, default=2.0, help="time per measurement and contender")
    parser.add_argument("--no-peers", action="store_true", help="only F.linear beside our kernel")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.csv and NAME.json")
    args = parser.parse_args()
    about = machine.describe()
    cpu.library()
    console.print_json(json.dumps(about))
    torch.set_num_threads(max(args.threads))
    if args.format == "ternary":
        rows = ternary_kernels.run(args)
        if args.save and rows:
            machine.save_results(args.save, rows, {"date": datetime.date.today().isoformat(), "machine": about})
        return 0
    args.batch = args.batch or [1, 8, 64]
    rows = run(args)
    torch.set_num_threads(max(args.threads))
    small, speed = overhead(), packing()
    for name, value in small.items():
        console.print(f"64x64, batch 1: {name}: {value:.2f} us per call", highlight=False)
    for name, value in speed.items():
        console.print(f"{name} 17408x5120 (89M weights): {value:.2f} s", highlight=False)
    if args.save and rows:
        data = {"date": datetime.date.today().isoformat(), "machine": about, "call_us": small, "packing_s": speed}
        machine.save_results(args.save, rows, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
