"""Kernel speeds against peers: `make bench`, or python benchmarks/kernels.py --help.

For each shape, share of zeros, batch and thread count: our formats with every kind of values,
F.linear, vLLM's prepacked onednn_mm, dense int8 and int4 of torch and vLLM, CSR of torch and scipy,
and the time the machine's memory needs for the dense bytes (sparse_kernels.py); with --format
ternary against llama.cpp's TQ2_0 and TQ1_0 (ternary_kernels.py). contest.py has the rules. Each
thread count runs in a process of its own: oneDNN does not obey torch.set_num_threads.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import sparse_kernels
import ternary_kernels
import torch
import torch.nn.functional as F
from contest import console
from shapes import SHAPES

import sparse_backend as sb
from sparse_backend.kernels import cpu


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


def with_threads(threads: int) -> list[dict[str, Any]]:
    """The rows of this command with one thread count, from a process that has only so many threads."""
    with tempfile.TemporaryDirectory(prefix="sparse-backend-bench-") as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, *sys.argv, "--threads", str(threads), "--rows", str(rows)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=True)
        found: list[dict[str, Any]] = json.loads(rows.read_text())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(SHAPES)
    parser.add_argument("--shapes", nargs="+", choices=names, default=names[:2], metavar="NAME", help=", ".join(names))
    parser.add_argument("--format", choices=("sparse", "ternary"), default="sparse")
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.5, 0.75, 0.9], help="shares of zeros")
    parser.add_argument("--batch", nargs="+", type=int, help="default: 1 8 64; ternary 1 8 128 512")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--seconds", type=float, default=2.0, help="time per measurement and contender")
    parser.add_argument("--no-peers", action="store_true", help="only dense bf16 beside ours")
    parser.add_argument("--ours", nargs="+", metavar="NAME", help="only these, such as 'sell int8'")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.csv and NAME.json")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # of one thread count, for the parent
    args = parser.parse_args()
    about = machine.describe()
    cpu.library()
    if args.rows is None:
        console.print_json(json.dumps(about))
    ternary = args.format == "ternary"
    args.batch = args.batch or ([1, 8, 128, 512] if ternary else [1, 8, 64])
    if args.rows is not None:
        torch.set_num_threads(args.threads[0])
        args.rows.write_text(json.dumps((ternary_kernels if ternary else sparse_kernels).run(args)))
        return 0
    rows = [row for threads in args.threads for row in with_threads(threads)]
    if ternary:
        if args.save and rows:
            machine.save_results(args.save, rows, {"date": datetime.date.today().isoformat(), "machine": about})
        return 0
    torch.set_num_threads(max(args.threads))
    small, speed = overhead(), packing()
    for name, value in small.items():
        console.print(f"64x64, batch 1: {name}: {value:.2f} us per call", highlight=False)
    for name, value in speed.items():
        console.print(f"{name} 17408x5120 (89M weights): {value:.2f} s", highlight=False)
    if args.save and rows:
        data = {"date": datetime.date.today().isoformat(), "machine": about, "call_us": small, "packing_s": speed}
        machine.save_results(args.save, rows, data)
        # Not at the top: transformers takes this file for the package `kernels`, and imports it.
        import pictures

        for path in pictures.of_kernels(args.save, rows, about["cpu"]):
            console.print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
