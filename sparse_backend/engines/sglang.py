"""Entry points of the SGLang plugin; the adapter itself is sglang_classes.py.

Apart so that SGLang is imported only when SGLang calls.
"""

from __future__ import annotations


def register() -> None:
    """Make SGLang know `--quantization sparse-compiled`. May be called any number of times."""
    from . import sglang_classes

    sglang_classes.register()


def activate_cpu_platform() -> str | None:
    """The class of the platform `sparse_cpu`, or None where SGLang has a device of its own.

    SGLang calls this when SGLANG_PLATFORM names the platform, and at every start without that
    variable: then it must not take over from a GPU or from SGLang's own AMX build.
    """
    import os

    chosen = os.environ.get("SGLANG_PLATFORM") == "sparse_cpu"
    if not chosen and (_has_accelerator() or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" or _has_amx_build()):
        return None
    return "sparse_backend.engines.sglang_cpu_platform.SparseCpuPlatform"


def _has_accelerator() -> bool:
    """Whether torch sees a device that SGLang has a platform for, or the processor is not ours."""
    import platform

    import torch

    devices = [getattr(torch, name, None) for name in ("cuda", "xpu", "npu", "musa", "hpu")]
    return platform.machine() != "x86_64" or any(d is not None and d.is_available() for d in devices)


def _has_amx_build() -> bool:
    """Whether this machine has AMX and an sgl_kernel for it: the one on package indexes is for GPUs."""
    import importlib

    import torch

    from ..kernels import cpu

    if not cpu.features()["amx_bf16"]:
        return False
    try:
        importlib.import_module("sgl_kernel")
    except Exception:  # the GPU build fails in many ways where there is no GPU
        return False
    return hasattr(torch.ops.sgl_kernel, "weight_packed_linear")
