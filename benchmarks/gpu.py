"""Our GPU kernels and torch's products, layer by layer: right first, then fast.

    python benchmarks/gpu.py --save                                all of it on an NVIDIA GPU, under 8 minutes
    python benchmarks/gpu.py --tune                                launch settings for this card, into the user's cache
    TRITON_INTERPRET=1 python benchmarks/gpu.py --dry-run          everything but the clock, on a CPU, tiny layers

Each result is compared with float64 on fresh random activations, in memory that held NaN before; what is wrong gets no
time. Times are those of CUDA graphs, as engines run them: a graph holds calls over copies of the weight that are larger
than the L2 cache together, and the median of its replays counts. What cannot be captured is timed call by call and
says so.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

BATCHES = (1, 2, 4, 8, 16, 32, 64, 256, 4096)
MODELS = ("qwen3.5-27b", "llama3-8b")
DRY_SHAPES, DRY_BATCHES = {"dry run": (64, 256)}, (1, 2, 4, 17, 65)
REPLAYS = 15


def about(device: torch.device) -> dict[str, Any]:
    import triton

    import sparse_backend as sb

    versions = {"torch": torch.__version__, "triton": triton.__version__, "sparse_backend": sb.__version__}
    if device.type != "cuda":
        return {"device": "CPU, interpreted", **versions}
    card = torch.cuda.get_device_properties(device)
    return {
        "device": card.name, "multiprocessors": card.multi_processor_count, "memory_gb": card.total_memory / 1e9,
        "l2_mb": card.L2_cache_size / 2**20, "capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda,
        "cublas": torch.backends.cuda.preferred_blas_library().name, **versions,
    }  # fmt: skip


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor a kernel allocates holds NaN, or 77."""
    empty = torch.Tensor.new_empty

    def filled(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(tensor, *args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else 77)

    torch.Tensor.new_empty = filled  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.new_empty = empty  # type: ignore[method-assign]


def error_of(c: Any, call: Any, x: torch.Tensor) -> float:
    """Norm of the error over the norm of the result, in float64; infinite if a result is no number."""
    prepared = c.prepare(x)
    with poisoned():
        y = call(prepared).double()
    expected = c.sees(x).double() @ c.reference.double().T
    if not bool(torch.isfinite(y).all()):
        return float("inf")
    return float((y - expected).norm() / expected.norm().clamp_min(1e-30))


def copy_bandwidth() -> float:
    """GB/s of a copy between two buffers of 1 GiB, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    times = [events(lambda: target.copy_(source)) for _ in range(REPLAYS)]
    return 2 * source.nbytes / statistics.median(times) / 1e9


def events(run: Any) -> float:
    """Seconds between two CUDA events around it."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def measure(calls: list[Any], x: torch.Tensor) -> tuple[float, str]:
    """Median seconds of a call, and how it was timed."""

    def all_of_them() -> None:
        for call in calls:
            call(x)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0](x)
        calls[-1](x)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_of_them()
        run, how = graph.replay, "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        run, how = all_of_them, "calls"
    run()
    seconds = statistics.median(events(run) for _ in range(REPLAYS)) / len(calls)
    return seconds, how


def rows_of(name: str, weight: torch.Tensor, batches: list[int], timed: bool) -> Iterator[dict[str, Any]]:
    """A row per batch of one contender: its error, and its time unless it is wrong."""
    from gpu_contenders import contender, copies

    n, k = weight.shape
    c = contender(name, weight)
    row = {"n": n, "k": k, "kernel": name}
    if c.problem:
        yield {**row, "note": c.problem}
        return
    calls = copies(c, weight.device, timed)
    row |= {"bits_per_weight": 8 * c.nbytes / (n * k), "copies": len(calls)}
    for batch in batches:
        x = torch.randn(batch, k, device=weight.device).bfloat16()
        try:
            error = error_of(c, calls[0], x)
        except (RuntimeError, NotImplementedError) as problem:
            yield {**row, "batch": batch, "note": f"does not run: {(str(problem).splitlines() or [''])[0][:80]}"}
            continue
        found: dict[str, Any] = {**row, "batch": batch, "error": error}
        if not error <= c.tolerance:
            yield {**found, "note": "WRONG"}
            continue
        if timed:
            seconds, how = measure(calls if batch < 256 else calls[:4], c.prepare(x))
            found |= {"us": seconds * 1e6, "gb_per_s": c.nbytes / seconds / 1e9, "timed": how}
        yield found


def compare(rows: list[dict[str, Any]], gbs: float) -> None:
    """Add what only the whole table knows: times over cuBLAS bf16, percent of the copy bandwidth."""
    dense = {(r["shape"], r["batch"]): r["us"] for r in rows if r["kernel"] == "cuBLAS bf16" and "us" in r}
    for r in rows:
        if "us" in r:
            r["percent_of_copy"] = 100 * r["gb_per_s"] / gbs
            r["over_cublas"] = dense.get((r["shape"], r["batch"]), float("nan")) / r["us"]


def show(rows: list[dict[str, Any]], seconds: float) -> None:
    for shape in dict.fromkeys(r["shape"] for r in rows):
        print(f"\n{shape}: times over cuBLAS bf16 (microseconds; percent of copy bandwidth)")
        mine = [r for r in rows if r["shape"] == shape]
        for name in dict.fromkeys(r["kernel"] for r in mine):
            cells = []
            for r in (r for r in mine if r["kernel"] == name):
                if "us" in r:
                    cells.append(
                        f"{r['batch']}: {r['over_cublas']:.2f} ({r['us']:.1f} us; {r['percent_of_copy']:.0f}%)"
                    )
                else:
                    cells.append(f"{r.get('batch', 'all')}: " + (r.get("note") or f"error {r['error']:.1e}"))
            print(f"  {name:24} " + "  ".join(cells))
    print(f"\n{len(rows)} rows in {seconds:.0f} s")


def picture(name: str, rows: list[dict[str, Any]], device: str) -> None:
    """Times over cuBLAS bf16 against batch, a panel per layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from machine import ROOT

    rows = [r for r in rows if "us" in r]
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    figure, panels = plt.subplots(1, len(shapes), figsize=(5 * len(shapes), 5), squeeze=False, sharey=True)
    for axes, shape in zip(panels[0], shapes, strict=True):
        for kernel in dict.fromkeys(r["kernel"] for r in rows):
            mine = [r for r in rows if (r["kernel"], r["shape"]) == (kernel, shape)]
            axes.plot([r["batch"] for r in mine], [r["over_cublas"] for r in mine], "o-", label=kernel, markersize=4)
        axes.set(title=f"{shape}, {device}", xlabel="batch", xscale="log", yscale="log")
    panels[0][0].set_ylabel("times as fast as cuBLAS bf16")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(ROOT / "benchmarks" / "results" / f"{name}.png", dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny layers on the CPU, checked and not timed")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="default: those of " + " and ".join(MODELS))
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="only these, beside cuBLAS bf16")
    parser.add_argument("--batch", nargs="+", type=int)
    parser.add_argument("--minutes", type=float, default=7.5, help="no further weight is begun after this")
    parser.add_argument("--tune", action="store_true", help="find launch settings for this card instead, on 17408x5120")
    parser.add_argument("--to", type=Path, metavar="FILE", help="of --tune: write them here")
    parser.add_argument("--save", action="store_true", help="write results/gpu-DEVICE.csv, .json and .png")
    args = parser.parse_args()
    if args.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        parser.exit(2, "a dry run needs Triton's interpreter: set TRITON_INTERPRET=1\n")
    if not args.dry_run and not torch.cuda.is_available():
        parser.exit(
            2, f"this needs an NVIDIA GPU and a CUDA build of torch; torch {torch.__version__} sees none.\n"
            "To walk through it without one: TRITON_INTERPRET=1 python benchmarks/gpu.py --dry-run\n",
        )  # fmt: skip
    from gpu_contenders import OURS, PEERS, random_weight
    from machine import save_results
    from shapes import SHAPES

    device = torch.device("cpu" if args.dry_run else "cuda")
    shapes = DRY_SHAPES if args.dry_run else {s: SHAPES[s] for s in args.shapes or SHAPES if args.shapes or named(s)}
    if args.tune:
        from gpu_tune import tune_and_save

        return tune_and_save(device, not args.dry_run, error_of, measure, args.to)
    names = list(dict.fromkeys(["cuBLAS bf16", *(args.kernels or [*PEERS, *OURS])]))
    batches = args.batch or list(DRY_BATCHES if args.dry_run else BATCHES)
    described = {"date": datetime.date.today().isoformat(), "machine": about(device)}
    print(described)
    start = time.monotonic()
    gbs = 0.0 if args.dry_run else copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for shape, (n, k) in shapes.items():
        for name in names:
            if time.monotonic() - start > 60 * args.minutes:
                rows.append({"shape": shape, "n": n, "k": k, "kernel": name, "note": "not measured: time was up"})
                continue
            weight = random_weight(n, k, device)
            rows += [{"shape": shape, **row} for row in rows_of(name, weight, batches, not args.dry_run)]
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    compare(rows, gbs)
    seconds = time.monotonic() - start
    show(rows, seconds)
    if args.save:
        described |= {"copy_gb_per_s": gbs, "seconds": seconds}
        from sparse_backend.kernels.triton.tuning import slug

        name = f"gpu-{slug(described['machine']['device'])}"
        save_results(name, rows, described)
        try:
            picture(name, rows, described["machine"]["device"])
        except ImportError as error:
            print(f"no picture: {error}")
    return 1 if any(r.get("note") == "WRONG" for r in rows) else 0


def named(shape: str) -> bool:
    return shape.startswith(MODELS)


if __name__ == "__main__":
    sys.exit(main())
