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
    import importlib.util
    import os

    import torch

    chosen = os.environ.get("SGLANG_PLATFORM") == "sparse_cpu"
    has_gpu = torch.cuda.is_available()
    has_amx_build = importlib.util.find_spec("sgl_kernel") is not None
    if not chosen and (has_gpu or has_amx_build or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"):
        return None
    return "sparse_backend.engines.sglang_cpu_platform.SparseCpuPlatform"
