"""SGLang on the platform sparse_cpu against vLLM: engine.py --engine sglang.

The same random models, compute threads and quantisation, each in a process of its own, taking turns. Then
`sglang.bench_serving` drives SGLang's own server over HTTP, with the dense model and with the converted one.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import sglang_runner
import vllm_runner
from processes import serving
from random_models import demo_config, llama_config, save_llama
from rich.console import Console
from rich.table import Table

console = Console(width=110)
ROOT = Path(__file__).resolve().parents[1]
PREFILL = 128
# bf16 logits of random models lie up to 2^-2 apart, and both engines round.
TIE = 0.5
FLAG = {"quantization": "sparse-compiled"}
INT8 = {"quantization_config": {"quant_method": "sparse-compiled", "activations": "int8"}}

# Model: (its config, what save_llama is asked for, vLLM's arguments, SGLang's).
MODELS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "dense, 95M": (lambda _: llama_config(1024, 2816, 8, 16, 4, 512, 64), {}, {}, {}),
    "70% zeros": (demo_config, {"sparsity": 0.7}, FLAG, FLAG),
    "ternary, int8": (
        demo_config, {"ternary": True}, {"hf_overrides": INT8}, {"json_model_override_args": json.dumps(INT8)},
    ),
}  # fmt: skip


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    threads = args.threads[0]
    chosen = {name: how for name, how in MODELS.items() if any(part in name for part in args.models)}
    for name, (config, how, vllm_args, sglang_args) in chosen.items():
        model = folder / name.replace(" ", "-").replace(",", "")
        save_llama(model, config(args.layers), **how)
        for batch in args.batch:
            job: dict[str, Any] = {"model": str(model), "prompts": [[5, 6, 7, 8]], "max_tokens": 24, "logprobs": 5}
            job["speed"] = {"tokens": args.tokens, "repeats": args.repeats, "batch": batch}
            if batch == 1:
                job["prefill"] = {"tokens": PREFILL, "repeats": args.repeats}
            vllm = {"skip_tokenizer_init": True, "max_model_len": 512, "enforce_eager": True, **vllm_args}
            sglang = {"skip_tokenizer_init": True, **sglang_args}
            contenders = {
                "vLLM, eager": (vllm_runner.run, vllm, {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}),
                "SGLang, sparse_cpu": (sglang_runner.run, sglang, {}),
            }
            if args.inductor:
                contenders["vLLM, compiled"] = (
                    vllm_runner.run, {**vllm, "enforce_eager": False}, {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
                )  # fmt: skip
            if batch == 1 and not sglang_args:
                native = {**sglang, "attention_backend": "torch_native"}
                contenders["SGLang, its own attention"] = (sglang_runner.run, native, {})
            results: dict[str, list[dict[str, Any]]] = {c: [] for c in contenders}
            for _ in range(args.rounds):
                for contender, (run, extra, variables) in contenders.items():
                    result = run([{**job, "args": extra}], OMP_NUM_THREADS=str(threads), **variables)[0]
                    results[contender].append(result)
            rows += report(name, batch, threads, results)
    if not args.no_serving:
        rows += served(args, folder)
    return rows


def _median(results: list[dict[str, Any]], what: str) -> float:
    values = [v for r in results for v in r.get(what, [])]
    return statistics.median(values) if values else float("nan")


def equal_tokens(base: dict[str, Any], other: dict[str, Any]) -> int:
    """How many tokens are equal before the first difference, which has to be a tie; no figure without."""
    for step, (a, b) in enumerate(zip(base["tokens"][0], other["tokens"][0], strict=True)):
        if a != b:
            logprobs = base["logprobs"][0][step]
            if logprobs[str(a)] - logprobs.get(str(b), -1e9) > TIE:
                raise RuntimeError(f"token {step} is {b} instead of {a}, and no tie: no speed is worth that")
            return step
    return len(base["tokens"][0])


def report(name: str, batch: int, threads: int, results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    base = results["vLLM, eager"]
    table = Table(
        "engine", "decode, tokens/s", "over vLLM", f"prefill of {PREFILL}, tokens/s", "over vLLM",
        "tokens equal", title=f"{name}, batch {batch}, {threads} thread(s)", title_justify="left",
    )  # fmt: skip
    rows = []
    for engine, runs in results.items():
        decode, prefill = _median(runs, "tokens_per_s_all"), _median(runs, "prefill_per_s_all")
        equal = equal_tokens(base[0], runs[0])
        row = {
            "model": name, "batch": batch, "threads": threads, "engine": engine, "decode_per_s": decode,
            "decode_over_vllm": decode / _median(base, "tokens_per_s_all"), "prefill_per_s": prefill,
            "prefill_over_vllm": prefill / _median(base, "prefill_per_s_all"),
            "tokens_equal_of_24": equal,
        }  # fmt: skip
        rows.append(row)
        table.add_row(
            engine, f"{decode:.1f}", f"{row['decode_over_vllm']:.2f}", f"{prefill:.0f}",
            f"{row['prefill_over_vllm']:.2f}", f"{equal} of 24",
        )  # fmt: skip
    console.print(table)
    return rows


def server_command(model: Path, arguments: list[str], port: int) -> list[str]:
    return [sglang_runner.python(), "-m", "sglang.launch_server", "--model-path", str(model), "--host", "127.0.0.1",
            "--port", str(port), "--max-total-tokens", "16384", "--dtype", "bfloat16", *arguments]  # fmt: skip


def served(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Eight clients at a time: `sglang.bench_serving` with prompts of 128 and answers of 32 random tokens."""
    model = folder / "serving"
    save_llama(model, demo_config(args.layers, vocab=4096), sparsity=0.7)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "models" / "python-lm" / name, model)
    rows, table = [], Table(
        "server, 70% zeros", "output tokens/s", "over dense", "median time to first token, ms", "per token, ms",
        title=f"sglang.bench_serving, 8 clients, {args.threads[0]} thread(s)", title_justify="left",
    )  # fmt: skip
    for engine, arguments in (("dense", []), ("sparse-compiled", ["--quantization", "sparse-compiled"])):
        environment = sglang_runner.environment(OMP_NUM_THREADS=str(args.threads[0]))
        command_for = functools.partial(server_command, model, arguments)
        with serving(command_for, environment, folder / "server.log", "/health_generate") as (url, _):
            out = folder / f"{engine}.jsonl"
            command = [sglang_runner.python(), "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url",
                       url, "--model", str(model), "--dataset-name", "random-ids", "--num-prompts", "24",
                       "--random-input-len", "128", "--random-output-len", "32", "--random-range-ratio", "1",
                       "--max-concurrency", "8", "--seed", "1", "--warmup-requests", "2",
                       "--output-file", str(out)]  # fmt: skip
            done = subprocess.run(command, env=sglang_runner.environment(), capture_output=True, text=True, check=False)
            if done.returncode != 0 or not out.exists():
                raise RuntimeError(f"bench_serving failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
            result = json.loads(out.read_text().splitlines()[-1])
        row = {
            "model": "70% zeros, served", "batch": 8, "threads": args.threads[0], "engine": f"SGLang server, {engine}",
            "decode_per_s": result["output_throughput"], "decode_over_vllm": float("nan"),
            "prefill_per_s": float("nan"), "prefill_over_vllm": float("nan"), "tokens_equal_of_24": "",
            "median_ttft_ms": result["median_ttft_ms"],
            "median_tpot_ms": result["median_tpot_ms"],
        }  # fmt: skip
        rows.append(row)
        table.add_row(
            engine, f"{row['decode_per_s']:.1f}", f"{row['decode_per_s'] / rows[0]['decode_per_s']:.2f}",
            f"{row['median_ttft_ms']:.0f}", f"{row['median_tpot_ms']:.0f}",
        )  # fmt: skip
    console.print(table)
    return rows
