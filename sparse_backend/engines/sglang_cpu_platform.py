"""SGLang on any x86-64 CPU: no `sgl_kernel`, no Triton, torch-native paths only.

Written against sglang 0.5.23. In-tree CPU mode needs the AMX build of sgl_kernel, which is on
no package index; SGLang's out-of-tree platform API lets the core take its torch-native paths.
"""

from __future__ import annotations

from typing import Any

import psutil
import torch
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class SparseCpuPlatform(SRTPlatform):  # type: ignore[misc]
    """Selected with SGLANG_PLATFORM=sparse_cpu, or by itself without a GPU and an AMX build."""

    _enum = PlatformEnum.OOT
    device_name = "sparse_cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        server_args.device = "cpu"
        server_args.disable_overlap_schedule = True
        if server_args.attention_backend is None:
            server_args.attention_backend = "torch_native"
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"
        server_args.disable_cuda_graph = True

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return int(psutil.virtual_memory().total)

    def get_current_memory_usage(self, device: Any = None) -> int:
        return int(psutil.Process().memory_info().rss)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_device(self, device_id: int = 0) -> torch.device:
        return torch.device("cpu")

    def set_device(self, device: torch.device) -> None:
        return

    def get_device_name(self, device_id: int = 0) -> str:
        return "cpu"

    def empty_cache(self) -> None:
        return

    def synchronize(self) -> None:
        return
