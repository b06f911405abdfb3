"""`make demo`: a pruned and a 1.58-bit language model through vLLM, with honest numbers.

Part 1, quality: the shipped model completes a snippet dense, pruned to 50% and compiled; the
last two must give the same tokens. Perplexity on a library module it never saw, at 0, 30, 50
and 70%. Part 2, speed: a random Llama with realistic layers at 70%, plain vLLM against the
same checkpoint with --quantization sparse-compiled. Part 3: a BitNet model as Hugging Face packs
it, served with no flag; and the speed of the same random Llama with ternary weights.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_models import demo_config, plain_copy, save_llama
from rich.console import Console
from rich.table import Table
from vllm_runner import run

from sparse_backend import Options
from sparse_backend.compiler.compile import compile_checkpoint
from sparse_backend.compiler.inspection import inspect
from sparse_backend.report import human_bytes

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "python-lm"
TERNARY = ROOT / "models" / "python-lm-ternary"
SNIPPET = "def read_config(path):\n    with open(path) as f:\n        "
# Held out of the model's training; read from the interpreter that runs this.
HELD_OUT = "textwrap"
FLAG = {"quantization": "sparse-compiled"}
INT8 = {"hf_overrides": {"quantization_config": {"quant_method": "sparse-compiled", "activations": "int8"}}}
LAYERS, SPARSITY = 6, 0.7

console = Console(width=min(120, max(90, Console().width)))


def held_out_windows(length: int = 512) -> list[list[int]]:
    from tokenizers import Tokenizer

    spec = importlib.util.find_spec(HELD_OUT)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text()
    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text).ids
    return [[0, *ids[i : i + length - 1]] for i in range(0, len(ids) - 1, length - 1)]


def quality(folder: Path) -> bool:
    console.print(f"\n[bold]1. A trained model ({MODEL.name}, 5.8M parameters) pruned, compiled, served[/bold]")
    levels = (0.3, 0.5, 0.7)
    for level in levels:
        compile_checkpoint(MODEL, folder / f"compiled-{level}", Options(sparsity=level))
    plain_copy(folder / "compiled-0.5", folder / "pruned-0.5")
    args = {"max_model_len": 600}
    ask = {"prompts": [SNIPPET], "max_tokens": 48, "args": args}
    measure = {"windows": held_out_windows(), "args": args}
    jobs = [
        {"model": str(MODEL), **ask, **measure},
        {"model": str(folder / "pruned-0.5"), **ask},
        *({"model": str(folder / f"compiled-{level}"), **ask, **measure} for level in levels),
    ]
    dense, pruned, *compiled = run(jobs)
    half = compiled[levels.index(0.5)]
    for title, result in (("dense", dense), ("pruned 50%, run dense", pruned), ("pruned 50%, compiled", half)):
        console.print(f"[cyan]{title}[/cyan]", highlight=False)
        console.print(SNIPPET + result["text"][0], highlight=False, markup=False)
    same = pruned["tokens"] == half["tokens"]
    verdict = "[green]identical[/green]" if same else "[red]DIFFERENT[/red]"
    console.print(f"tokens of the last two: {verdict}\n")
    table = Table(
        "zeros", "perplexity", "projections", title=f"held-out module '{HELD_OUT}', through vLLM", title_justify="left"
    )
    sizes = [inspect(folder / f"compiled-{level}").by_format()[0] for level in levels]
    table.add_row("0% (dense)", f"{dense['perplexity']:.1f}", human_bytes(sizes[0].dense_bytes))
    for level, result, size in zip(levels, compiled, sizes, strict=True):
        table.add_row(f"{level:.0%}", f"{result['perplexity']:.1f}", human_bytes(size.packed_bytes))
    console.print(table)
    return same


def bitnet(folder: Path) -> bool:
    """The shipped BitNet model, packed and compiled: the same tokens, at an eighth of the bytes."""
    console.print(f"\n[bold]3. A 1.58-bit model ({TERNARY.name}, 5.8M parameters), served as it is[/bold]")
    compile_checkpoint(TERNARY, folder / "ternary", Options())
    args = {"max_model_len": 600}
    job = {"prompts": [SNIPPET], "max_tokens": 48, "args": args, "windows": held_out_windows()}
    packed, compiled = run([{"model": str(TERNARY), **job}, {"model": str(folder / "ternary"), **job}])
    console.print(SNIPPET + packed["text"][0], highlight=False, markup=False)
    same = packed["tokens"] == compiled["tokens"]
    verdict = "[green]identical[/green]" if same else "[red]DIFFERENT[/red]"
    size = inspect(folder / "ternary").by_format()[0]
    console.print(
        f"tokens of Hugging Face's packing and of ours: {verdict}; perplexity {packed['perplexity']:.1f}; projections "
        f"{human_bytes(size.dense_bytes)} in bf16, {human_bytes(size.packed_bytes)} packed\n",
        highlight=False,
    )
    return same


def speed(folder: Path, name: str, sparsity: float, ternary: bool = False) -> None:
    save_llama(folder / name, demo_config(LAYERS), sparsity, ternary=ternary)
    args = {"skip_tokenizer_init": True, "max_model_len": 512}
    job = {
        "model": str(folder / name),
        "speed": {"tokens": 36, "repeats": 5},
        "prompts": [[5, 6, 7, 8]],
        "max_tokens": 24,
    }
    # A process each, so that each one's memory is its own.
    dense = run([{**job, "args": args}])[0]
    compiled = run([{**job, "args": {**args, **(INT8 if ternary else FLAG)}}])[0]
    show_speed(dense, compiled)
    shutil.rmtree(folder / name)


def show_speed(dense: dict[str, Any], compiled: dict[str, Any]) -> None:
    agree = sum(a == b for a, b in zip(dense["tokens"][0], compiled["tokens"][0], strict=True))
    console.print(
        f"compute threads: {dense['threads']} dense, {compiled['threads']} compiled; eager; batch 1", highlight=False
    )
    for line in dict.fromkeys(re.findall(r"sparse-compiled: (.*)", compiled["log"])):
        console.print(f"vLLM's log: {line}", highlight=False, markup=False)
    table = Table("", "plain vLLM, bf16", "sparse-compiled", "ratio", title="decode, batch 1", title_justify="left")
    rates = dense["tokens_per_s"], compiled["tokens_per_s"]
    table.add_row("tokens/s", f"{rates[0]:.1f}", f"{rates[1]:.1f}", f"{rates[1] / rates[0]:.2f}x faster")
    memory = dense["memory"], compiled["memory"]
    table.add_row(
        "resident memory (1.07 GB of it KV cache)", *(human_bytes(m) for m in memory), f"{memory[1] / memory[0]:.2f}x"
    )
    table.add_row("loading, s", f"{dense['load_s']:.1f}", f"{compiled['load_s']:.1f}", "")
    table.add_row("greedy tokens in common", "24", str(agree), "random weights: ties are common")
    console.print(table)


def main() -> int:
    start = time.monotonic()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    shape = f"random Llama, hidden 2560, intermediate 6912, {LAYERS} layers"
    with tempfile.TemporaryDirectory(prefix="sparse-backend-demo-") as name:
        folder = Path(name)
        same = quality(folder)
        console.print(f"\n[bold]2. Speed: {shape}, {SPARSITY:.0%} zeros[/bold]")
        speed(folder, "llama", SPARSITY)
        same &= bitnet(folder)
        console.print(f"[bold]   Speed: {shape}, ternary weights, int8 activations[/bold]")
        speed(folder, "ternary-llama", 0.0, ternary=True)
    console.print(f"done in {time.monotonic() - start:.0f} s", highlight=False)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
