"""benchmarks/gpu.py on a machine without a GPU: what it says, and a walk through all of it but the clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT


def run(*arguments, interpret):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments], capture_output=True, text=True, check=False,
        env={**environment, "TRITON_INTERPRET": "1"} if interpret else environment,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure this GPU")
def test_no_gpu_is_said_at_once():
    result = run(interpret=False)
    assert result.returncode == 2
    assert "needs an NVIDIA GPU" in result.stderr
    assert "--dry-run" in result.stderr
    assert run("--dry-run", interpret=False).returncode == 2


def test_a_dry_run_checks_every_kernel():
    result = run("--dry-run", "--batch", "1", "5", "65", interpret=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = {line[2:26].strip(): line for line in result.stdout.splitlines() if line.startswith("  ")}
    for kernel in ("cuBLAS bf16", "8:16 bf16 (50%)", "sell bf16 (90%)", "ternary 2-bit, int8 x", "block bf16 (50%)"):
        assert lines[kernel].count("error") == 3
    assert "does not run here" in lines["2:4 bf16 (torch)"]


def test_tuning_checks_settings_and_keeps_them(tmp_path):
    result = run("--tune", "--dry-run", "--to", str(tmp_path / "card.json"), interpret=True)
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = json.loads((tmp_path / "card.json").read_text())["kernels"]
    assert kernels["nm/gemv/1"] == [2, 4, 4]
    assert {name.partition("/")[0] for name in kernels} == {"nm", "sell", "ternary", "block"}
