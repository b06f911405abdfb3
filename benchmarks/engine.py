"""Decode speed, load time and memory through vLLM: python benchmarks/engine.py --help.

Plain vLLM bf16 against the same checkpoint with --quantization sparse-compiled, each in a
process of its own, taking turns, with the same compute threads. The tokens are compared
first. With --ternary: 1.58-bit models, with --lowbit dense ones, and llama.cpp as a peer (ternary_engine.py). With
--engine sglang: SGLang against vLLM, and SGLang's server (sglang_engine.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import sglang_engine
import ternary_engine
from random_models import demo_config, save_llama
from rich.console import Console
from rich.table import Table
from vllm_runner import run

FLAG = {"quantization": "sparse-compiled"}
console = Console(width=110)


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    flag: dict[str, Any] = dict(FLAG)
    if args.values:
        flag["hf_overrides"] = {"quantization_config": {"quant_method": "sparse-compiled", "values": args.values}}
    for zeros in args.zeros:
        model = folder / f"llama-{zeros}"
        config = demo_config(args.layers)
        linear_bytes = save_llama(model, config, zeros)
        engine = {"skip_tokenizer_init": True, "max_model_len": 512, "enforce_eager": not args.inductor}
        for batch in args.batch:
            job = {"model": str(model), "prompts": [[5, 6, 7, 8]], "max_tokens": 24, "logprobs": 5}
            job["speed"] = {"tokens": args.tokens, "repeats": args.repeats, "batch": batch}
            results: dict[str, list[dict[str, Any]]] = {"vLLM bf16": [], "sparse-compiled": []}
            for _ in range(args.rounds):
                for name, extra in (("vLLM bf16", {}), ("sparse-compiled", flag)):
                    kernels = {"config": config, "zeros": zeros, "values": args.values, "dense": not extra}
                    speed = {**job["speed"], "kernels": kernels}
                    results[name].append(run([{**job, "speed": speed, "args": {**engine, **extra}}])[0])
            dense, sparse = (r[0]["tokens"][0] for r in results.values())
            speeds = {name: [v for r in rs for v in r["tokens_per_s_all"]] for name, rs in results.items()}
            for name, rs in results.items():
                rows.append(
                    {
                        "zeros": zeros, "batch": batch, "engine": name, "layers": args.layers,
                        "linear_gb": linear_bytes / 1e9, "packed_gb": linear_bytes * (1 - zeros + 1 / 16) / 1e9,
                        "threads": rs[0]["threads"], "tokens_per_s": statistics.median(speeds[name]),
                        "over_vllm_bf16": statistics.median(speeds[name]) / statistics.median(speeds["vLLM bf16"]),
                        "memory_gb": min(r["memory"] for r in rs) / 1e9, "load_s": min(r["load_s"] for r in rs),
                        "tokens_in_common": sum(a == b for a, b in zip(dense, sparse, strict=True)),
                    }
                )  # fmt: skip
            # What the step would take if only the projections changed. Steps and kernels of one process took turns;
            # of another process memory may have been faster, so only times of one are subtracted.
            step, alone = (
                [statistics.median(v for r in rs for v in r[key]) for rs in results.values()]
                for key in ("step_s_all", "kernels_s_all")
            )
            rest = [s - k for s, k in zip(step, alone, strict=True)]
            reached = (rest[0] + alone[1]) / (rest[1] + alone[1])
            for row, s, k in zip(rows[-2:], step, alone, strict=True):
                row |= {"step_ms": s * 1e3, "kernels_ms": k * 1e3, "reached_of_predicted": reached}
            show(rows[-2:])
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    dense, sparse = rows
    saved, possible = dense["memory_gb"] - sparse["memory_gb"], sparse["linear_gb"] - sparse["packed_gb"]
    table = Table(
        "engine", "tokens/s", "ratio", "memory, GB", "load, s", title_justify="left",
        title=f"{dense['zeros']:.0%} zeros, batch {dense['batch']}, {dense['threads']} threads",
    )  # fmt: skip
    for r in rows:
        table.add_row(
            r["engine"], f"{r['tokens_per_s']:.1f}", f"{r['over_vllm_bf16']:.2f}", f"{r['memory_gb']:.3f}",
            f"{r['load_s']:.1f}",
        )  # fmt: skip
    console.print(table)
    parts = "; ".join(
        f"{r['engine']}: a step {r['step_ms']:.1f} ms, its projections alone {r['kernels_ms']:.1f} ms" for r in rows
    )
    console.print(
        f"{parts}; speed-up reached {dense['reached_of_predicted']:.0%} of what the kernels predict", highlight=False
    )
    console.print(
        f"memory saved: {saved:.3f} GB of {possible:.3f} GB possible ({saved / possible:.0%}); "
        f"{sparse['tokens_in_common']} of 24 greedy tokens equal (random weights: ties are common)",
        highlight=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm", help="engine that is measured")
    parser.add_argument(
        "--models", nargs="+", default=[""], help="with --engine sglang: only names that contain one of these"
    )
    parser.add_argument("--no-serving", action="store_true", help="with --engine sglang: no bench_serving")
    parser.add_argument("--ternary", action="store_true", help="ternary weights instead of sparse ones")
    parser.add_argument(
        "--lowbit", action="store_true", help="dense weights as bf16x12, int8 and int4 (llama.cpp: Q4_0, Q8_0, BF16)"
    )
    parser.add_argument(
        "--threads",
        nargs="+",
        type=int,
        default=[os.cpu_count() or 1],
        help="with --ternary and --lowbit; one with --engine",
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        default=[""],
        help="with --ternary and --lowbit: only names that contain one of these",
    )
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.7])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--values", choices=("bf16x12", "int8", "int4"), help="of the sparse weights; default bf16")
    parser.add_argument("--layers", type=int, default=12, help="12 layers are 836M parameters")
    parser.add_argument("--tokens", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each kind, taking turns")
    parser.add_argument("--inductor", action="store_true", help="with torch.compile; eager otherwise")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.csv and NAME.json")
    args = parser.parse_args()
    if args.engine == "sglang" and (args.ternary or args.lowbit):
        parser.error("--engine sglang measures a ternary model too; leave out --ternary and --lowbit")
    about = machine.describe()
    console.print_json(json.dumps(about))
    with tempfile.TemporaryDirectory(prefix="sparse-backend-bench-") as folder:
        run_all = sglang_engine.measure if args.engine == "sglang" else measure
        rows = (ternary_engine.measure if args.ternary or args.lowbit else run_all)(args, Path(folder))
    if args.save:
        machine.save_results(args.save, rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
