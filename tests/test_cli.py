from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import PYTHON_LM

from sparse_backend.options import CHOICES, Options


def cli(*args, **env):
    command = [sys.executable, "-m", "sparse_backend.cli", *map(str, args)]
    environment = {**os.environ, "COLUMNS": "200", **env}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "Traceback" not in result.stderr, result.stderr
    return result


def test_help_teaches():
    text = cli("--help").stdout
    for command in ("compile", "inspect", "doctor", "serve"):
        assert command in text
    compiling = cli("compile", "--help").stdout
    assert "sparse-backend compile ./llama ./llama-50 --sparsity 0.5" in compiling
    for key in dataclasses.fields(Options):
        assert key.name == "rules" or f"--{key.name.replace('_', '-')} " in compiling, key.name
    formats = compiling[compiling.index("--format") : compiling.index("--values")]
    for name in CHOICES["format"]:
        assert re.search(rf"\b{name}\b", formats), name
    assert re.search(r"sparse_backend \d", cli("--version").stdout)


def test_compile_then_inspect(tmp_path):
    out = tmp_path / "out"
    result = cli("compile", PYTHON_LM, out, "--sparsity", "0.5", "--batch", "2")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["batch"] == 2
    assert result.returncode == 0, result.stderr
    assert "bitmask" in result.stdout
    assert "differs from the original" in result.stdout
    text = cli("inspect", out, "--verify").stdout
    assert "42 packed modules" in text
    assert "50.0%" in text
    assert "all checksums match" in text
    rows = json.loads(cli("inspect", out, "--json").stdout)["modules"]
    assert len(rows) == 42
    assert all(row["zeros"] == 0.5 for row in rows)
    assert "down_proj" in cli("inspect", out, "--modules").stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compile", PYTHON_LM, "{tmp}", "--sparsity", "0.5"], "exists already"),
        (["compile", PYTHON_LM, "{tmp}/o", "--ignore", "*"], "nothing to pack"),
        (["compile", PYTHON_LM, "{tmp}/o", "--batch", "0"], "option 'batch' = 0 is not available"),
        (["compile", PYTHON_LM, "{tmp}/o", "--sparsity", "1.5"], "0 <= s < 1"),
        (["compile", PYTHON_LM, "{tmp}/o", "--format", "csr"], "allowed: auto, dense, bitmask"),
        (["compile", PYTHON_LM, "{tmp}/o", "--rule", "{"], "is not JSON"),
        (["compile", PYTHON_LM, "{tmp}/o", "--pattern", "2:4", "--method", "wanda"], "pass --calibration FILE"),
        (["compile", PYTHON_LM, "{tmp}/o", "--pattern", "2:4", "--calibration-tokens", "9999"], "pass that too"),
        (
            ["compile", PYTHON_LM, "{tmp}/o", "--pattern", "2:4", "--allocation", "error"],
            "'allocation' and 'pattern' contradict",
        ),
        (
            ["compile", PYTHON_LM, "{tmp}/o", "--sparsity", "0.5", "--method", "wanda", "--calibration", "{tmp}/none"],
            "cannot be read: No such file",
        ),
        (["compile", "{tmp}/none", "{tmp}/o"], "no such folder"),
        (["inspect", "{tmp}"], "no config.json"),
        (["serve", PYTHON_LM, "--engine", "tgi"], "allowed: vllm, sglang"),
        (["serve", "{tmp}"], "no config.json"),
        (["serve", PYTHON_LM, "--", "--tensor-parallel-size", "x"], "whole number"),
    ],
)
def test_errors_are_one_line_and_exit_2(tmp_path, args, message):
    result = cli(*[str(a).format(tmp=tmp_path) if "{tmp}" in str(a) else a for a in args])
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.lstrip().startswith("error: ")
    assert not (tmp_path / "o").exists()


def test_serve_shows_what_it_would_run(tmp_path):
    text = cli("serve", PYTHON_LM, "--show", "--", "--port", "1", "--tensor-parallel-size=2").stdout
    assert "vllm.entrypoints.openai.api_server --model" in text
    assert "--quantization sparse-compiled" in text
    assert text.strip().endswith("--port 1 --tensor-parallel-size=2")
    assert "VLLM_CPU_KVCACHE_SPACE=" in text
    assert "VLLM_CPU_OMP_THREADS_BIND=" in text
    sglang = cli("serve", PYTHON_LM, "--engine", "sglang", "--show", "--", "--port", "1").stdout
    assert "SGLANG_PLATFORM=sparse_cpu" in sglang
    assert "sglang.launch_server --model-path" in sglang
    assert sglang.strip().endswith("--quantization sparse-compiled --port 1")
    own = cli("serve", PYTHON_LM, "--show", VLLM_CPU_KVCACHE_SPACE="3").stdout
    assert "VLLM_CPU_KVCACHE_SPACE" not in own


def test_doctor_finds_machine_and_plugin():
    result = cli("doctor")
    assert result.returncode == 0, result.stdout
    for text in ("kernel levels", "scalar", "vllm-cpu 0.32.0", "registered: --quantization sparse-compiled"):
        assert text in result.stdout
    hidden = cli("doctor", VLLM_PLUGINS="other")
    assert hidden.returncode == 1
    assert "VLLM_PLUGINS=other leaves it out" in hidden.stdout
    forced = cli("doctor", SPARSE_BACKEND_ISA="avx9000")
    assert forced.returncode == 1
    assert "unknown level" in forced.stdout
