"""SGLang adapter: `--quantization sparse-compiled`, plain and compiled checkpoints.

Written against sglang 0.5.23. Entry point `sglang.srt.plugins` calls `register()` in every
process. SGLang has no layer-wise loading to use here, so a projection is packed after the
model's weights are loaded, one at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.server_args import add_quantization_method_choices

from ..compiler import checkpoint
from ..options import QUANT_METHOD, Options
from . import common

logger = logging.getLogger(__name__)

# SGLang models name their merged projections alike but do not all declare them.
_MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
_LOADER = "sglang.srt.model_loader.loader.DefaultModelLoader"


class SparseCompiledConfig(QuantizationConfig):  # type: ignore[misc]
    """Options and what loading found; one per model."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__()
        self.options = options or Options()
        self.names = common.Names()
        self.loading = common.Loading()

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparseCompiledConfig:
        # SGLang adds two keys of its own to the checkpoint's.
        own = {k: v for k, v in config.items() if k not in ("packed_modules_mapping", "hf_config")}
        return cls(Options.from_dict(own))

    def get_scaled_act_names(self) -> list[str]:
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            return None
        self.names.merged = {**_MERGED, **self.packed_modules_mapping}
        return SparseCompiledLinearMethod(self, prefix, common.options_for(self.options, self.names, prefix))


class SparseCompiledLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """One projection: loaded dense by SGLang's own code, packed when it is whole."""

    def __init__(self, config: SparseCompiledConfig, prefix: str, options: Options | None) -> None:
        super().__init__()
        self.config = config
        self.prefix = prefix
        self.options = options
        self.done = False
        self.kernel: common.LayerKernel | None = None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.done:
            return
        self.done = True
        self.kernel = self.config.loading.convert(layer, self.prefix, self.options)
        if self.kernel is None:
            super().process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.kernel is not None:
            return self.kernel(layer, x, bias)
        y: torch.Tensor = super().apply(layer, x, bias)
        return y


def _config_of(model: torch.nn.Module) -> SparseCompiledConfig | None:
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, SparseCompiledLinearMethod):
            return method.config
    return None


def _all_weights(
    original: Callable[..., Iterator[tuple[str, torch.Tensor]]], loader: Any, model_config: Any, model: torch.nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """Around DefaultModelLoader._get_all_weights: expand compiled modules, prune if asked."""
    weights = original(loader, model_config, model)
    config = _config_of(model)
    if config is None:
        return weights
    info = common.read_checkpoint(model_config.model_path)
    modules = {} if info is None else info.modules
    if info is not None and modules:
        common.check_compile_time_keys(config.options, info)
    return common.prune_stream(checkpoint.expand(weights, modules), config.options, modules)


def _load_model(original: Callable[..., torch.nn.Module], *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Around DefaultModelLoader.load_model: the summary."""
    model = original(*args, **kwargs)
    config = _config_of(model)
    if config is not None:
        config.loading.finish(config.options, lambda line: logger.info("%s: %s", QUANT_METHOD, line))
    return model


def register() -> None:
    """Register the classes and hooks above; idempotent."""
    if QUANT_METHOD in QUANTIZATION_METHODS:
        return
    add_quantization_method_choices([QUANT_METHOD])
    # Machines with AMX look only into the second.
    QUANTIZATION_METHODS[QUANT_METHOD] = SparseCompiledConfig
    CPU_QUANTIZATION_METHODS[QUANT_METHOD] = SparseCompiledConfig
    HookRegistry.register(f"{_LOADER}._get_all_weights", _all_weights, HookType.AROUND)
    HookRegistry.register(f"{_LOADER}.load_model", _load_model, HookType.AROUND)
