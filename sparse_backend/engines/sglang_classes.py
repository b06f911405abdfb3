"""SGLang adapter: `--quantization sparse-compiled`, plain and compiled checkpoints.

Written against sglang 0.5.23. Entry point `sglang.srt.plugins` calls `register()` in every
process. SGLang has no layer-wise loading to use here, so a projection is packed after the
model's weights are loaded, one at a time.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.layers.linear import LinearBase, RowParallelLinear, get_group_rank_size
from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.server_args import add_quantization_method_choices

from ..compiler.bitnet import BitNet
from ..errors import OptionError
from ..options import QUANT_METHOD, Options
from . import common, layers, names
from .sglang_cpu_platform import register_hooks

logger = logging.getLogger(__name__)

# SGLang models name their merged projections alike but do not all declare them.
_MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
BITNET_ARCHITECTURE = "BitNetForCausalLM"
_REGISTRY = "sglang.srt.models.registry._ModelRegistry"
# SGLang's mark of a module whose weight cannot be replaced while it serves, and what it then answers.
_NO_UPDATES = ("_derived_weight_cache_error", "sparse-compiled weights are packed; start a new server to change them")
# Of the loader that is hooked; others would leave compiled checkpoints as they are.
_LOAD_FORMATS = ("auto", "safetensors", "pt", "npcache")
_LOADER = "sglang.srt.model_loader.loader.DefaultModelLoader"


class SparseCompiledConfig(common.ConfigAnswers, QuantizationConfig):  # type: ignore[misc]
    """Options and what loading found; one per model."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__()
        self.options = options or Options()
        self.names = names.Names()
        self.loading = common.Loading()
        self.mapper: Any = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparseCompiledConfig:
        # SGLang adds two keys of its own to the checkpoint's.
        own = {k: v for k, v in config.items() if k not in ("packed_modules_mapping", "hf_config")}
        result = cls(cls.options_of(own))
        result.loading.claimed = cls.is_bitnet(own)
        result.packed_modules_mapping = dict(config.get("packed_modules_mapping") or {})
        return result

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Kept until the checkpoint's names are known: see `_get_quantization_config`."""
        self.mapper = hf_to_sglang_mapper

    def get_scaled_act_names(self) -> list[str]:
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            return None
        self.names.merged = {**_MERGED, **self.packed_modules_mapping}
        return SparseCompiledLinearMethod(self, prefix, *names.options_for(self.options, self.names, prefix))


class SparseCompiledLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """One projection: loaded dense by SGLang's own code, packed when it is whole."""

    def __init__(self, config: SparseCompiledConfig, prefix: str, options: Options | None, reason: str) -> None:
        super().__init__()
        self.config = config
        self.prefix = prefix
        self.options = options
        self.reason = reason
        self.done = False
        self.kernel: layers.LayerKernel | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().create_weights(layer, input_size_per_partition, output_partition_sizes, *args, **kwargs)
        self.sizes = output_partition_sizes
        # What the checkpoint lacks stays NaN and is refused; SGLang itself would not notice.
        cast(torch.Tensor, layer.weight).data.fill_(float("nan"))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.done:
            return
        self.done = True
        parts = self.config.names.parts(self.prefix, self.sizes)
        self.kernel = self.config.loading.convert(layer, self.prefix, self.options, self.reason, parts)
        if self.kernel is None:
            super().process_weights_after_loading(layer)
        else:
            setattr(layer, *_NO_UPDATES)

    @property
    def stays_dense(self) -> bool:
        """Whether the platform may run this layer as any dense one."""
        return self.done and self.kernel is None

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.kernel is not None:
            absmax = None
            if self.kernel.int8_activations and isinstance(layer, RowParallelLinear):
                absmax = _absmax_of_all_ranks(layer, x)
            return self.kernel(layer, x, bias, absmax)
        y: torch.Tensor = super().apply(layer, x, bias)
        return y


def _absmax_of_all_ranks(layer: RowParallelLinear, x: torch.Tensor) -> torch.Tensor | None:
    """The largest magnitude of each token, of which each rank sees a part; None without other ranks."""
    group = layer.tp_group
    if get_group_rank_size(group)[1] == 1:
        return None
    if not hasattr(group, "device_group"):
        raise OptionError("int8 activations are not available under this parallel layout; set 'activations' to keep")
    absmax = x.abs().amax(dim=-1).float().flatten()
    torch.distributed.all_reduce(absmax, op=torch.distributed.ReduceOp.MAX, group=group.device_group)
    return absmax


class SparseCompiledHeadMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """The output head under option `lm_head`; as an embedding, where it is tied, it stays what it was.

    Attributes:
        kernel: None where it stays dense, which is SGLang's own method's business.
    """

    def __init__(self, loading: common.Loading, head: torch.nn.Module, format: str, tied: bool) -> None:
        super().__init__()
        # A module for the packed tensors: SGLang wants to find `weight` in its own.
        self.packed = torch.nn.Module()
        self.packed.weight = torch.nn.Parameter(cast(torch.Tensor, head.weight).data, requires_grad=False)
        self.kernel = loading.convert_head(self.packed, "lm_head", format)
        if self.kernel is not None and not tied:
            head.weight = torch.nn.Parameter(cast(torch.Tensor, head.weight).data[:0].clone(), requires_grad=False)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [..., vocabulary of this rank]."""
        if self.kernel is None:
            raise RuntimeError("lm_head: dense, and run by the method of packed ones")
        return self.kernel(self.packed, x, bias)


def _convert_head(model: torch.nn.Module, config: SparseCompiledConfig) -> None:
    """Round the output head if the options ask for it."""
    if config.options.lm_head == "keep" or config.options.for_module("lm_head") is None:
        return
    head = getattr(model, "lm_head", None)
    if not isinstance(head, VocabParallelEmbedding):
        raise OptionError(f"option 'lm_head': {type(model).__name__} has no output head; drop the option")
    embeddings = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding) and m is not head]
    tied = not isinstance(head, ParallelLMHead) or any(m.weight is head.weight for m in embeddings)
    method = SparseCompiledHeadMethod(config.loading, head, config.options.lm_head, tied)
    if method.kernel is not None:
        setattr(head, *_NO_UPDATES)
        head.quant_method = method


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
    weights = iter(weights)
    first = next(weights, None)  # by now a model from the hub has been downloaded
    info = common.read_checkpoint(model_config.model_path, model_config.revision)
    modules = {} if info is None else info.modules
    if info is not None:
        config.loading.bitnet = BitNet.of(info.config, info.tensors)
    if info is not None and modules:
        common.check_compile_time_keys(config.options, info)
    stream = itertools.chain([] if first is None else [first], weights)
    return config.loading.weights(stream, modules, config.options, model_config.dtype)


def check_checkpoint(server_args: Any, previous: Callable[[Any], None]) -> None:
    """SGLang's step that looks at the model: a damaged compiled checkpoint ends the launch before others start."""
    from sglang.srt.arg_groups.model_override_base import model_config_of

    previous(server_args)
    if str(server_args.model_path).startswith("instance://"):  # weights come from another server
        return
    model = model_config_of(server_args)
    if model.quantization == QUANT_METHOD:
        if server_args.load_format not in _LOAD_FORMATS:
            raise OptionError(
                f"--load-format {server_args.load_format}: {QUANT_METHOD} needs one of {', '.join(_LOAD_FORMATS)}"
            )
        common.read_checkpoint(model.model_path, model.revision)


def _load_model(original: Callable[..., torch.nn.Module], *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Around DefaultModelLoader.load_model: the summary."""
    model = original(*args, **kwargs)
    config = _config_of(model)
    if config is not None:
        _convert_head(model, config)
        log, warn = (functools.partial(say, "%s: %s", QUANT_METHOD) for say in (logger.info, logger.warning))
        config.loading.finish(config.options, log, warn)
    return model


def _get_quantization_config(original: Callable[..., Any], model_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the loader's function: options name modules as the checkpoint does, and SGLang may rename them."""
    config = original(model_config, *args, **kwargs)
    if isinstance(config, SparseCompiledConfig) and config.mapper is not None:
        info = common.read_checkpoint(model_config.model_path, model_config.revision)
        mapped = config.mapper.apply_list
        config.names.learn([] if info is None else info.module_names(), lambda name: next(iter(mapped([name])), None))
    return config


def _is_supported(original: Callable[..., bool], registry: Any, architecture: str) -> bool:
    """Around the model registry's question: an architecture that SGLang lacks, imported when it is asked for."""
    if architecture == BITNET_ARCHITECTURE and architecture not in registry.models:
        from .sglang_bitnet import BitNetForCausalLM

        registry.models[architecture] = BitNetForCausalLM
    return original(registry, architecture)


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
    HookRegistry.register(
        "sglang.srt.model_loader.loader._get_quantization_config", _get_quantization_config, HookType.AROUND
    )
    HookRegistry.register(f"{_REGISTRY}.is_arch_supported", _is_supported, HookType.AROUND)
    register_resolution_hook("handle_model_capability_adjustments")(check_checkpoint)
    register_hooks()
