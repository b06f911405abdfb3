"""SGLang on any x86-64 CPU: no `sgl_kernel`, no Triton.

Written against sglang 0.5.23. In-tree CPU mode needs the AMX build of sgl_kernel, which is on no package index;
SGLang's out-of-tree platform API lets the core take its torch-native paths, and sglang_cpu_layers.py replaces
the slow ones. This file is imported before SGLang's layers can be.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from ..errors import OptionError
from . import sglang_cpu_limits as limits

logger = logging.getLogger(__name__)

NAME = limits.NAME
# Of the memory that is free at the start, for weights and KV cache together.
MEMORY_FRACTION = 0.8
# For the KV cache: SGLang fills it with zeros at once, so what it does not need is better left to others.
CACHE_FRACTION, CACHE_BYTES = 0.25, 16 * 2**30
BIND_VARIABLE = "SGLANG_CPU_OMP_THREADS_BIND"


class SparseCpuPlatform(SRTPlatform):  # type: ignore[misc]
    """Selected with SGLANG_PLATFORM=sparse_cpu, or by itself without a GPU and an AMX build."""

    _enum = PlatformEnum.OOT
    device_name = NAME
    device_type = "cpu"
    _shared: str | None = None

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Choose what runs here, and refuse what cannot; in the launching process, before others start."""
        from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

        # As the user gave them: by now SGLang itself has put intel_amx into empty ones.
        given = dict(server_args._raw_input)
        limits.check_arguments(given)
        server_args.device = "cpu"
        server_args.disable_overlap_schedule = True  # there is no device to overlap with
        server_args.disable_hybrid_swa_memory = True  # one cache for all layers, addressed by one table
        if given.get("attention_backend") is None:
            server_args.attention_backend = NAME
        graphs = server_args.cuda_graph_config
        for phase in Phase.ALL if graphs is not None else ():
            graphs = with_phase(graphs, phase, backend=Backend.DISABLED)
        server_args.cuda_graph_config = graphs
        ranks = max(1, server_args.tp_size * server_args.dp_size * server_args.pp_size // server_args.nnodes)
        if given.get("mem_fraction_static") is None:
            # Each rank takes its share of what is free on the whole machine.
            server_args.mem_fraction_static = MEMORY_FRACTION / ranks
        self._share_cores(ranks)

    def _share_cores(self, ranks: int) -> None:
        """Tell ranks their cores, unless the user did; an earlier engine of this process may have told its own."""
        if os.environ.get(BIND_VARIABLE) == SparseCpuPlatform._shared:
            os.environ.pop(BIND_VARIABLE, None)
        SparseCpuPlatform._shared = None
        if ranks > 1 and BIND_VARIABLE not in os.environ:
            SparseCpuPlatform._shared = share_cores(sorted(os.sched_getaffinity(0)), ranks)
            os.environ[BIND_VARIABLE] = SparseCpuPlatform._shared

    def init_backend(self) -> None:
        """In every process that runs a model, before one is built."""
        from . import sglang_cpu_layers

        sglang_cpu_layers.register()

    def post_load_model(self, model: torch.nn.Module) -> None:
        """Dense projections and the head get our op too."""
        from . import sglang_cpu_layers

        sglang_cpu_layers.use_dense_op(model)

    def get_dispatch_key_name(self) -> str:
        """Name under which sglang_cpu_layers.py registers our ops."""
        return NAME

    def get_default_attention_backend(self) -> str:
        """Ours; torch_native works too."""
        return NAME

    def get_device_total_memory(self, device_id: int = 0) -> int:
        """Bytes of main memory, or of what this container may use of it."""
        total = int(psutil.virtual_memory().total)
        limit = Path("/sys/fs/cgroup/memory.max")
        text = limit.read_text().strip() if limit.exists() else "max"
        return min(total, int(text)) if text.isdigit() else total

    def get_current_memory_usage(self, device: Any = None) -> int:
        """Resident bytes of this process."""
        return int(psutil.Process().memory_info().rss)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        """Free and total bytes of main memory."""
        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)

    def is_pin_memory_available(self, device: Any = None) -> bool:
        """There is nothing to pin it for."""
        return False

    def get_device(self, device_id: int = 0) -> str:
        """The torch device type."""
        return "cpu"

    def set_device(self, device: torch.device) -> None:
        """Nothing to choose."""

    def get_device_name(self, device_id: int = 0) -> str:
        """For SGLang's logs."""
        return "cpu"

    def empty_cache(self) -> None:
        """Nothing is cached."""

    def synchronize(self) -> None:
        """Everything is done when a call returns."""


def share_cores(cores: list[int], ranks: int) -> str:
    """SGLang's notation for an equal share of the cores per rank: "0,1|2,3".

    Raises:
        OptionError: there are fewer cores than ranks.
    """
    share = len(cores) // ranks
    if share == 0:
        raise OptionError(
            f"{NAME}: {ranks} ranks (tp_size * dp_size * pp_size) need as many cores, this process has {len(cores)}; "
            "lower --tp-size"
        )
    return "|".join(",".join(map(str, cores[i * share : (i + 1) * share])) for i in range(ranks))


def parse_cores(text: str | list[int] | None) -> list[int]:
    """Core numbers from "0-3,8" as SGLang writes them; empty for none."""
    if text is None or isinstance(text, list):
        return [int(core) for core in text or []]
    cores: list[int] = []
    for part in filter(None, str(text).split(",")):
        first, _, last = part.partition("-")
        cores += range(int(first), int(last or first) + 1)
    return cores


def bind_threads(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Around SGLang's `_init_cpu_threads_env`, which can bind threads with `sgl_kernel` only."""
    from sglang.srt.platforms import current_platform

    if current_platform.device_name != NAME:
        original(*args, **kwargs)
        return
    allowed = os.sched_getaffinity(0)
    cores = sorted(allowed & set(parse_cores(kwargs.get("local_omp_cpuid")))) or sorted(allowed)
    os.sched_setaffinity(0, cores)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(cores))
    logger.info("%s: %d thread(s) on cores %s", NAME, torch.get_num_threads(), ",".join(map(str, cores)))


def cache_tokens(model: Any, tp_size: int, available: int) -> int:
    """How many tokens' K and V to keep on each of `tp_size` ranks, of a machine with `available` free bytes."""
    heads = model.get_num_kv_heads(tp_size)
    width = model.head_dim + (getattr(model, "v_head_dim", None) or model.head_dim)
    per_token = int(model.num_hidden_layers * heads * width * torch.empty(0, dtype=model.dtype).element_size())
    share = min(int(available * CACHE_FRACTION), CACHE_BYTES) // tp_size
    return max(1, share // max(1, per_token))


def check_model(server_args: Any, previous: Callable[[Any], None]) -> None:
    """SGLang's step that looks at the model: refuse the kinds that cannot run here, size the KV cache."""
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.platforms import current_platform

    previous(server_args)
    if current_platform.device_name != NAME or str(server_args.model_path).startswith("instance://"):
        return
    model = model_config_of(server_args)
    limits.check_model(model)
    given = server_args._raw_input
    if given.get("max_total_tokens") is None and given.get("mem_fraction_static") is None:
        tokens = cache_tokens(model, server_args.tp_size, psutil.virtual_memory().available)
        declare_resolution(server_args, NAME, max_total_tokens=tokens)


def register_hooks() -> None:
    """The two places where SGLang has no platform method; called by the plugin, in every process."""
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    add_attention_backend_choices([NAME])
    register_resolution_hook("handle_model_capability_adjustments")(check_model)
    HookRegistry.register("sglang.srt.distributed.bootstrap._init_cpu_threads_env", bind_threads, HookType.AROUND)
