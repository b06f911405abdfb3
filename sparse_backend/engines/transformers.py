"""transformers adapter: import this, and `from_pretrained` runs compiled checkpoints with our kernels.

    import sparse_backend.engines.transformers
    model = AutoModelForCausalLM.from_pretrained(OUT)

Written against transformers 5.19. A compiled checkpoint needs no argument: a projection's dense weight is taken away
before weights are loaded, and buffers for its canonical form put in its place; transformers' own loader fills them,
and then one projection after the other is checked, lowered and replaced by a SparseLinear. Plain checkpoints are
converted weight by weight as they are read, with `quantization_config=SparseCompiledConfig(sparsity=0.5, ...)`.
The dense model is never in memory. `device_map="cuda"` runs it on a GPU: machine forms are made there, and what has no
kernel there is dense.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..api import SparseLinear
from ..compiler import checkpoint, convert
from ..errors import CheckpointError, OptionError, SparseBackendError, WeightError
from ..formats import get_format
from ..kernels import registry
from ..options import QUANT_METHOD, Options
from ..packed import PackedWeight
from . import common

logger = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda")

Tensor = TypeVar("Tensor", bound=torch.Tensor)


class SparseCompiledConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Options, by the keys they have everywhere: `SparseCompiledConfig(sparsity=0.5, ignore=["*.o_proj"])`.

    Raises:
        OptionError: naming the key and what is allowed.
    """

    def __init__(self, **options: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.options = Options.from_dict(options)

    def to_dict(self) -> dict[str, Any]:
        """The object for config.json."""
        return self.options.to_dict()


class SparseCompiledQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers asks while it loads a model.

    Attributes:
        options: of the checkpoint, or given by the user for a plain one.
        loading: the report of this load.
        info: headers of the checkpoint.
        names: the checkpoint's module name of the model's modules.
        failed: what went wrong while a plain checkpoint's weights passed; transformers would only log it.
    """

    def __init__(self, quantization_config: SparseCompiledConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.options = quantization_config.options
        self.loading = common.Loading()
        self.names: dict[str, str] = {}
        self.failed: SparseBackendError | None = None
        self.dtype = torch.bfloat16

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises OptionError for a device_map with anything but the CPU or GPUs, or with both."""
        devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
        types = {"cuda" if isinstance(d, int) else str(d).partition(":")[0]: d for d in devices if d is not None}
        for kind, device in types.items():
            if kind not in DEVICES:
                raise OptionError(
                    f"{QUANT_METHOD}: device_map names '{device}', there are kernels for {' and '.join(DEVICES)}; "
                    'pass device_map="cuda", "cpu" or none'
                )
        if len(types) > 1:
            raise OptionError(
                f"{QUANT_METHOD}: device_map spreads the model over CPU and GPU; a weight runs on the kernels it was "
                'made for and cannot be moved between them: pass device_map="cuda" or "cpu"'
            )

    def update_tp_plan(self, config: Any) -> Any:
        """Raises OptionError for tensor parallelism."""
        if getattr(config, "distributed_config", None) is not None:
            raise OptionError(
                f"{QUANT_METHOD}: transformers cannot cut packed weights for tensor parallelism; drop "
                "distributed_config (tp_plan, tp_size), or serve the model with vLLM or SGLang"
            )
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, dtype: torch.dtype | None = None, **_: Any
    ) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        if not files or files[0].suffix != ".safetensors":
            raise CheckpointError(
                f"{QUANT_METHOD}: loads safetensors files, not {files[0] if files else 'a state_dict'}; save the "
                "model with safe_serialization=True"
            )
        self.dtype = dtype or torch.get_default_dtype()
        self.info = checkpoint.read(files[0].parent)
        if self.info.modules and not self.pre_quantized:
            raise CheckpointError(
                f"{self.info.folder}: holds compiled tensors, but its config.json says nothing of {QUANT_METHOD}"
            )
        self.names = _module_names(model, self.info)
        for path, name in self.names.items():
            if name in self.info.modules:
                self._expect(model.get_submodule(path), name)

    def _expect(self, module: torch.nn.Module, name: str) -> None:
        """Put buffers of a packed weight's tensors in the place of the dense weight."""
        entry = self.info.modules[name]
        holder = torch.nn.Module()
        for spec in get_format(entry.format).specs(entry.attributes):
            _, shape = self.info.tensors[f"{name}.{entry.format}.{spec.name}"]
            empty = torch.empty(shape, dtype=spec.dtype or entry.torch_dtype, device="meta")
            holder.register_buffer(spec.name, empty)
        module.add_module(entry.format, holder)
        # Not None, and marked: transformers lets models initialise what the checkpoint lacks, and their code for that
        # may name any layer's weight.
        del module.weight
        module.weight = _initialised(torch.empty(0))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self.failed is not None:
            raise self.failed
        for path, name in self.names.items():
            if name in self.info.modules:
                self._settle(model, path, name)
        self._convert_head(model)
        # transformers' tensors are views of the mapped files: what is left of them would keep all of their pages.
        for module in model.modules():
            if not isinstance(module, SparseLinear):
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    tensor.data = tensor.data.clone()
        self.loading.finish(self.options, logger.info, logger.warning)
        return model

    def _settle(self, model: torch.nn.Module, path: str, name: str) -> None:
        """Make a layer of the tensors that have come."""
        module, entry = model.get_submodule(path), self.info.modules[name]
        placed = dict(module.get_submodule(entry.format).named_buffers())
        delattr(module, entry.format)
        device = self.loading.kernel_device(next(iter(placed.values())))
        packed = checkpoint.assemble(name, entry, {key: tensor.cpu() for key, tensor in placed.items()})
        options = self.options.for_module(name)
        if options is not None:
            packed = _with_activations(packed, options)
        try:
            if options is None or not isinstance(module, torch.nn.Linear):
                reason = convert.IGNORED if options is None else f"{type(module).__name__} is no torch.nn.Linear"
                self._keep_dense(module, name, packed.unpack(), reason, device)
            elif options.format not in ("auto", packed.format):  # a load-time key: config.json names another now
                self._pack(model, path, name, packed.unpack(), options, device)
            elif (refusal := registry.refusal(packed, device.type)) is not None:
                self.loading.refuse(name, refusal)
                self._keep_dense(module, name, packed.unpack(), refusal, device)
            else:
                self._replace(model, path, name, packed, device)
        except WeightError as error:
            what = str(error).removeprefix(f"{name}: ")
            text = f"{entry.file}: module {name} is damaged ({what}); {checkpoint.RECOMPILE}"
            raise CheckpointError(text) from None

    def _replace(
        self, model: torch.nn.Module, path: str, name: str, packed: PackedWeight, device: torch.device
    ) -> None:
        linear = model.get_submodule(path)
        assert isinstance(linear, torch.nn.Linear)
        machine = self.loading.lower(name, packed, device)
        dense_bytes = packed.shape[0] * packed.shape[1] * self.dtype.itemsize
        self.loading.report.add_packed(path, packed.format, dense_bytes, machine.nbytes)
        layer = SparseLinear(machine, linear.bias)
        layer.train(linear.training)
        model.set_submodule(path, layer)

    def _pack(
        self, model: Any, path: str, name: str, weight: torch.Tensor, options: Options, device: torch.device
    ) -> None:
        """Pack a dense weight as the options say."""
        packed, reason = self.loading.pack(name, weight, options, device)
        if packed is None:
            self._keep_dense(model.get_submodule(path), name, weight, reason, device)
        else:
            self._replace(model, path, name, packed, device)

    def _keep_dense(
        self, module: torch.nn.Module, name: str, weight: torch.Tensor, reason: str, device: torch.device
    ) -> None:
        del module.weight
        # Triton's interpreter multiplies on the CPU what is meant for a GPU.
        place = device if device.type == "cpu" or torch.cuda.is_available() else weight.device
        parameter = torch.nn.Parameter(weight.to(place, self.dtype), requires_grad=False)
        module.register_parameter("weight", _initialised(parameter))
        self.loading.report.add_dense(name, parameter.nbytes, reason)

    def _convert_head(self, model: Any) -> None:
        """Round the output head as option `lm_head` asks; a tied one leaves the embedding as it is."""
        head = model.get_output_embeddings()
        if self.options.lm_head == "keep" or self.options.for_module("lm_head") is None:
            return
        if not isinstance(head, torch.nn.Linear):
            return
        path = next(path for path, module in model.named_modules() if module is head)
        weight = head.weight.detach()
        device = self.loading.kernel_device(weight)
        self.loading.heads += 1
        packed, reason = self.loading.pack(path, weight, Options(format=self.options.lm_head), device)
        if packed is None:  # not as _keep_dense does: it may be the embedding's
            self.loading.report.add_dense(path, weight.nbytes, reason)
            return
        self._replace(model, path, path, packed, device)
        self.loading.report.note("head")
        model.all_tied_weights_keys.pop(f"{path}.weight", None)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a plain checkpoint's tensor is the weight of a projection."""
        path, _, leaf = param_name.rpartition(".")
        name = self.names.get(path, path)
        return (
            leaf == "weight" and isinstance(model.get_submodule(path), torch.nn.Linear) and convert.is_projection(name)
        )

    def get_quantize_ops(self) -> ConversionOps:
        """What packs such a weight."""
        return _PackOne(self)

    def pack_plain(self, model: Any, path: str, weight: torch.Tensor) -> None:
        """Change, pack and replace one weight of a plain checkpoint."""
        name = self.names.get(path, path)
        options = self.options.for_module(name)
        device = self.loading.kernel_device(weight)
        try:
            if options is None:
                return self._keep_dense(model.get_submodule(path), name, weight, convert.IGNORED, device)
            weight, what = convert.change_weight(name, weight.cpu(), options)
            self.loading.report.note(what)
            self._pack(model, path, name, weight, options, device)
        except SparseBackendError as error:
            self.failed = self.failed or error

    def is_serializable(self) -> bool:
        """Raises CheckpointError: a loaded model is in the form of this machine, its checkpoint in the portable one."""
        raise CheckpointError(
            f"save_pretrained: a {QUANT_METHOD} model in memory holds this machine's form of its weights, which is no "
            f"checkpoint; copy {self.info.folder} instead, or make one: sparse-backend compile MODEL OUT"
        )

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return False


class _PackOne(ConversionOps):  # type: ignore[misc]
    """Replaces a layer as its dense weight passes by."""

    def __init__(self, quantizer: SparseCompiledQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, Any]:
        """Nothing is left for transformers to set."""
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            self.quantizer.pack_plain(model, name.removesuffix(".weight"), weight)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


def _initialised(tensor: Tensor) -> Tensor:
    """The same tensor, marked: else transformers draws it at random."""
    setattr(tensor, "_is_hf_initialized", True)  # noqa: B010 - transformers' own mark
    return tensor


def _with_activations(packed: PackedWeight, options: Options) -> PackedWeight:
    """The same weight under option `activations`, if that is set and matters to its format."""
    attributes = packed.attributes
    if options.activations is None or "activations" not in attributes:
        return packed
    changed = {**attributes, "activations": options.activations}
    return PackedWeight(packed.format, packed.shape, packed.dtype, packed.tensors, changed)


def _module_names(model: Any, info: checkpoint.Checkpoint) -> dict[str, str]:
    """Path in the model -> module name in the checkpoint, by transformers' own renaming of tensors.

    Raises:
        CheckpointError: transformers makes one tensor of a packed one and others.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    names = {}
    for name in info.module_names():
        renamed, merged = rename_source_key(f"{name}.weight", renamings, converters, model.base_model_prefix, state)
        if merged is not None and name in info.modules:
            raise CheckpointError(
                f"{info.folder}: transformers stores {name} in another shape in this model; compile the original "
                "checkpoint again with this module in 'ignore'"
            )
        if renamed in state and merged is None:
            names[renamed.removesuffix(".weight")] = name
    return names


def register() -> None:
    """Register the classes above; idempotent."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(SparseCompiledConfig)
        register_quantizer(QUANT_METHOD)(SparseCompiledQuantizer)


register()
