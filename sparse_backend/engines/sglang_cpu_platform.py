"""SGLang on any x86-64 CPU: no `sgl_kernel`, no Triton.

Written against sglang 0.5.23. In-tree CPU mode needs the AMX build of sgl_kernel, which is on
no package index; SGLang's out-of-tree platform API lets the core take its torch-native paths, and
sglang_cpu_layers.py replaces the slow ones. This file is imported before SGLang's layers can be.
"""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

NAME = "sparse_cpu"


class SparseCpuPlatform(SRTPlatform):  # type: ignore[misc]
    """Selected with SGLANG_PLATFORM=sparse_cpu, or by itself without a GPU and an AMX build."""

    _enum = PlatformEnum.OOT
    device_name = NAME
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        server_args.device = "cpu"
        server_args.disable_overlap_schedule = True
        if server_args.attention_backend is None:
            server_args.attention_backend = NAME
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"
        server_args.disable_cuda_graph = True

    def init_backend(self) -> None:
        from . import sglang_cpu_layers

        sglang_cpu_layers.register()

    def post_load_model(self, model: torch.nn.Module) -> None:
        from . import sglang_cpu_layers

        sglang_cpu_layers.use_dense_op(model)

    def get_dispatch_key_name(self) -> str:
        return NAME

    def get_default_attention_backend(self) -> str:
        return NAME

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return int(psutil.virtual_memory().total)

    def get_current_memory_usage(self, device: Any = None) -> int:
        return int(psutil.Process().memory_info().rss)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_device(self, device_id: int = 0) -> str:
        return "cpu"

    def set_device(self, device: torch.device) -> None:
        return

    def get_device_name(self, device_id: int = 0) -> str:
        return "cpu"

    def empty_cache(self) -> None:
        return

    def synchronize(self) -> None:
        return
