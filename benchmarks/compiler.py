"""Time and peak memory of `sparse-backend analyze` and `compile` on a random Llama of 836M parameters (1.67 GB), and
of vLLM loading what was compiled.

    python benchmarks/compiler.py --analyze --compile bitmask --compile ternary --load --save compiler

Each run is a process of its own; its peak is told above that of one that only imports what it needs. The pages
of memory-mapped shards count as its memory while they are mapped.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import random_models
from vllm_runner import run

CLI = [sys.executable, "-m", "sparse_backend.cli"]
IMPORTS = [sys.executable, "-c", "import sparse_backend.cli, sparse_backend.compiler.compile"]
CALIBRATE = [sys.executable, "-c", "from sparse_backend.compiler import calibrate; calibrate.current_profile()"]
COMPILE = {"bitmask": ["--sparsity", "0.5", "--format", "bitmask"], "ternary": ["--format", "ternary"]}


def measure(name: str, command: list[str]) -> dict[str, Any]:
    """Wall and processor seconds and the peak of one process, with the machine's load while it ran."""
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{log.read()[-4000:]}")
    return {
        "run": name, "seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9, "load": os.getloadavg()[0],
    }  # fmt: skip


def load(name: str, folder: Path, dense_bytes: int) -> dict[str, Any]:
    """vLLM's own time for the weights, and the most memory while it loaded against what it kept."""
    # A small cache: it is reserved after the weights, and would hide a peak of theirs.
    args = {"skip_tokenizer_init": True, "max_model_len": 256, "kv_cache_memory_bytes": 64 << 20}
    result = run([{"model": str(folder), "args": args}], VLLM_CPU_KVCACHE_SPACE=None)[0]  # it would win
    if "error" in result:
        sys.exit(f"{name} failed: {result['error']}")
    seconds = float(re.findall(r"Loading weights took ([\d.]+) seconds", result["log"])[0])
    row = {
        "run": name, "seconds": seconds, "gb_per_s": dense_bytes / seconds / 1e9,
        "peak_gb": result["peak_resident"] / 1e9,
        "resident_gb": result["resident"] / 1e9, "peak_over_resident": result["peak_resident"] / result["resident"],
        "load": os.getloadavg()[0],
    }  # fmt: skip
    print(
        f"{name}: weights in {seconds:.1f} s, {row['gb_per_s']:.2f} GB/s of dense weights; "
        f"peak {row['peak_gb']:.2f} GB, {row['peak_over_resident']:.2f}x of the {row['resident_gb']:.2f} GB that stay"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--analyze", action="store_true", help="with ranks, prediction (calibrated before) and reports")
    parser.add_argument("--compile", action="append", choices=COMPILE, default=[], help="repeatable")
    parser.add_argument("--load", action="store_true", help="load every compiled checkpoint in vLLM, warm")
    parser.add_argument("--model", type=Path, help="keep the model there, or use the one that is there")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--save", help="name of the files in benchmarks/results")
    args = parser.parse_args()
    about = machine.describe()
    print(f"{about['cpu']}, {os.cpu_count()} cores, torch {about['torch']}")
    with tempfile.TemporaryDirectory(dir=args.model.parent if args.model else None) as folder:
        model = args.model or Path(folder) / "model"
        if not model.exists():
            random_models.save_llama(model, random_models.demo_config(args.layers))
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        jobs = []
        if args.analyze:
            # A machine is calibrated once; that is no part of analysing.
            subprocess.run(CALIBRATE, check=True)
            reports = ["--html", f"{folder}/report.html", "--json", f"{folder}/report.json"]
            jobs.append(("analyze", [*CLI, "analyze", str(model), *reports]))
        for name in args.compile:
            jobs.append((f"compile {name}", [*CLI, "compile", str(model), f"{folder}/out", *COMPILE[name]]))
        rows, loads = [measure("imports", IMPORTS)], []
        for name, command in jobs:
            row = measure(name, command)
            if args.load and name.startswith("compile"):
                loads.append(load(name.replace("compile", "load"), Path(folder) / "out", size))
            shutil.rmtree(f"{folder}/out", ignore_errors=True)
            row["above_imports_gb"] = row["peak_gb"] - rows[0]["peak_gb"]
            row["gb_per_s"] = size / row["seconds"] / 1e9
            rows.append(row)
            print(
                f"{name}: {row['seconds']:.1f} s, {row['gb_per_s']:.2f} GB/s, peak {row['peak_gb']:.2f} GB, "
                f"{row['above_imports_gb']:.2f} above imports ({row['cpu_seconds']:.0f} s of processor time, "
                f"load {row['load']:.1f})"
            )
    if args.save:
        rows += loads
        machine.save_results(args.save, rows, {**about, "model_bytes": size})


if __name__ == "__main__":
    main()
