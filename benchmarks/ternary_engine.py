"""Ternary (engine.py --ternary) or dense low-bit (--lowbit) models end to end: vLLM bf16, this plugin, llama.cpp.

All run the same random weights (a Llama with BitNet-2B-4T's layers, vocabulary 512) on the same
number of compute threads, each in a process of its own, taking turns. llama.cpp reads a GGUF that
this writes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import ggml_peer
from random_models import demo_config, save_llama
from rich.console import Console
from rich.table import Table
from vllm_runner import run

console = Console(width=110)
PREFILL = 128


def overrides(**options: Any) -> dict[str, Any]:
    return {"hf_overrides": {"quantization_config": {"quant_method": "sparse-compiled", **options}}}


TERNARY: dict[str, dict[str, Any]] = {
    "vLLM bf16": {},
    "ours, 2 bits, int8": overrides(activations="int8"),
    "ours, 1.6 bits, int8": overrides(activations="int8", bits=1.6),
    "ours, 2 bits, keep": overrides(),
}
LOWBIT: dict[str, dict[str, Any]] = {
    "vLLM bf16": {},
    "ours, bf16x12": overrides(format="bf16x12"),
    "ours, int8": overrides(format="int8"),
    "ours, int4": overrides(format="int4"),
}
# Types of llama.cpp's that are peers of each; the first is compared with in the table.
PEERS = {"ternary": ggml_peer.TERNARY_TYPES, "lowbit": ("Q4_0", "Q8_0", "BF16")}


def ask_vllm(model: Path, extra: dict[str, Any], batch: int, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    job: dict[str, Any] = {
        "model": str(model),
        "speed": {"tokens": args.tokens, "repeats": args.repeats, "batch": batch},
        "args": {"skip_tokenizer_init": True, "max_model_len": 512, "enforce_eager": not args.inductor, **extra},
    }
    if batch == 1:
        job["prefill"] = {"tokens": PREFILL, "repeats": args.repeats}
    # vLLM takes this before it counts cores itself.
    result = run([job], OMP_NUM_THREADS=str(threads), VLLM_CPU_OMP_THREADS_BIND="nobind")[0]
    if result["threads"] != threads:
        raise RuntimeError(f"vLLM computes with {result['threads']} threads, not {threads}")
    return {
        "decode": result["tokens_per_s_all"], "prefill": result.get("prefill_per_s_all", []),
        "memory": result["memory"], "load_s": result["load_s"],
    }  # fmt: skip


def ask_llama(gguf: Path, batch: int, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    numbers = [threads, batch, PREFILL, args.tokens, args.repeats]
    command = [sys.executable, ggml_peer.__file__, str(gguf), *map(str, numbers)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rates: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return {**rates, "memory": None, "load_s": None}


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    model = folder / "model"
    save_llama(model, demo_config(args.layers), ternary=args.ternary)
    engines = TERNARY if args.ternary else LOWBIT
    contenders: dict[str, Any] = {
        name: lambda b, t, extra=extra: ask_vllm(model, extra, b, t, args) for name, extra in engines.items()
    }
    why = ggml_peer.available()
    if why is not None:
        console.print(f"llama.cpp is not measured: {why}", highlight=False, markup=False)
    else:
        for kind in PEERS["ternary" if args.ternary else "lowbit"]:
            ggml_peer.write_gguf(model, folder / f"{kind}.gguf", kind)
            gguf = folder / f"{kind}.gguf"
            contenders[f"llama.cpp {kind}"] = lambda b, t, gguf=gguf: ask_llama(gguf, b, t, args)
    contenders = {name: ask for name, ask in contenders.items() if any(part in name for part in args.engines)}
    rows: list[dict[str, Any]] = []
    for threads in args.threads:
        for batch in args.batch:
            samples: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
            for _ in range(args.rounds):
                for name, ask in contenders.items():
                    samples[name].append(ask(batch, threads))
            rows += report(samples, batch, threads, args)
    return rows


def report(
    samples: dict[str, list[dict[str, Any]]], batch: int, threads: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    def median(name: str, what: str) -> float:
        values = [v for sample in samples.get(name, []) for v in sample[what]]
        return statistics.median(values) if values else float("nan")

    def best(name: str) -> float:
        return max((v for sample in samples.get(name, []) for v in sample["decode"]), default=float("nan"))

    mode = "inductor" if args.inductor else "eager"
    peer = PEERS["ternary" if args.ternary else "lowbit"][0]
    table = Table(
        "", "decode, tokens/s (best)", "over vLLM bf16 (best)", f"over {peer} (best)",
        f"prefill of {PREFILL}, tokens/s", "over vLLM bf16",
        "load, s", title=f"batch {batch}, {threads} compute thread(s), {args.layers} layers, vLLM {mode}",
        title_justify="left",
    )  # fmt: skip
    rows = []
    for name, of in samples.items():
        decode, prefill = median(name, "decode"), median(name, "prefill")
        load = min((s["load_s"] for s in of if s["load_s"] is not None), default=float("nan"))
        row = {
            "engine": name, "batch": batch, "threads": threads, "layers": args.layers, "mode": mode,
            "decode_per_s": decode, "decode_over_vllm_bf16": decode / median("vLLM bf16", "decode"),
            f"decode_over_{peer.lower()}": decode / median(f"llama.cpp {peer}", "decode"),
            # Where memory changes speed between processes, the best of each met it in the same state.
            "best_decode_per_s": best(name), "best_over_vllm_bf16": best(name) / best("vLLM bf16"),
            f"best_over_{peer.lower()}": best(name) / best(f"llama.cpp {peer}"), "prefill_per_s": prefill,
            "prefill_over_vllm_bf16": prefill / median("vLLM bf16", "prefill"), "load_s": load,
        }  # fmt: skip
        rows.append(row)
        table.add_row(
            name, f"{decode:.1f} ({best(name):.1f})",
            f"{row['decode_over_vllm_bf16']:.2f} ({row['best_over_vllm_bf16']:.2f})",
            f"{row[f'decode_over_{peer.lower()}']:.2f} ({row[f'best_over_{peer.lower()}']:.2f})",
            f"{prefill:.0f}", f"{row['prefill_over_vllm_bf16']:.2f}", f"{load:.1f}",
        )  # fmt: skip
    console.print(table)
    return rows
