"""What every engine adapter shares: module names, options per projection, packing, the summary."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from .. import __version__
from ..compiler import checkpoint, convert
from ..compiler.bitnet import METHOD as BITNET
from ..compiler.bitnet import BitNet
from ..errors import CheckpointError, OptionError, SparseBackendError, WeightError
from ..formats.ternary import Ternary
from ..formats.unstructured import LEVELS
from ..kernels import registry
from ..options import COMPILE_TIME_KEYS, QUANT_METHOD, Options
from ..packed import MachineWeight, PackedWeight
from ..report import Report
from .handover import PackedTensor, Scratch
from .layers import LayerKernel, NormedKernel


def read_checkpoint(model: str, revision: str | None = None) -> checkpoint.Checkpoint | None:
    """Headers of a model on this disk; None for a hub name that is not fully cached yet.

    Raises:
        CheckpointError: it is a folder, and damaged.
    """
    folder = Path(model)
    if folder.is_dir():
        return checkpoint.read(folder) if any(folder.glob("*.safetensors")) else None
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json"]
        cached = snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=patterns)
        return checkpoint.read(cached)
    except Exception:  # not downloaded yet, or in part: the engine's loader is next, and so are its errors
        return None


def check_compile_time_keys(options: Options, info: checkpoint.Checkpoint) -> None:
    """Options of a compiled checkpoint may only differ from its own in load-time keys.

    Raises:
        OptionError: naming the key.
    """
    own = dict(info.config.get("quantization_config") or {})
    if own.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{info.folder}: holds compiled tensors, but its config.json says nothing of {QUANT_METHOD}"
        )
    compiled = Options.from_dict(own)
    compile_time = [{k: rule[k] for k in ("match", *COMPILE_TIME_KEYS) if k in rule} for rule in options.rules]
    if any(len(rule) > 1 for rule in compile_time) and options.rules != compiled.rules:
        raise OptionError(
            f"option 'rules' sets keys that were fixed when {info.folder} was compiled "
            f"({', '.join(COMPILE_TIME_KEYS)}); drop them, or compile the original checkpoint again"
        )
    for key in COMPILE_TIME_KEYS:
        if getattr(options, key) != getattr(compiled, key):
            raise OptionError(
                f"option '{key}' was fixed at {getattr(compiled, key)!r} when {info.folder} was compiled; "
                "drop it, or compile the original checkpoint again"
            )


class ConfigAnswers:
    """What both engines ask of a quantisation config, with the same answers. Mixed in first."""

    @staticmethod
    def options_of(config: Mapping[str, Any]) -> Options:
        """Options from config.json's quantization_config: ours, or a BitNet checkpoint's (all defaults)."""
        return Options() if ConfigAnswers.is_bitnet(config) else Options.from_dict(config)

    @staticmethod
    def is_bitnet(config: object) -> bool:
        """Whether a quantization_config is a BitNet checkpoint's."""
        return isinstance(config, Mapping) and config.get("quant_method") == BITNET

    @classmethod
    def override_quantization_method(cls, config: Any, user: str | None = None, **_: Any) -> str | None:
        """Claim BitNet checkpoints, which no engine runs by itself."""
        return QUANT_METHOD if cls.is_bitnet(config) else None

    @classmethod
    def get_name(cls) -> str:
        """The method's name in flags and config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Activations may have any of the kernels' dtypes."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """No GPU is needed."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: options stand in config.json, and plain checkpoints have none at all."""
        return []


_NAMED = 3  # modules that a warning names, of those it is about
_CHANGES = {
    "pruned": "{count} projections pruned as asked ('sparsity')",
    "rounded": "{count} projections rounded as asked ('format', 'values')",
    "pruned and rounded": "{count} projections pruned and rounded as asked ('sparsity', 'values')",
    "head": "the output head was rounded as asked ('lm_head')",
}


def _refuse_nan(prefix: str, weight: torch.Tensor) -> None:
    """What packs was looked at while packing; this is for weights that do not."""
    if torch.isnan(weight).any():
        raise WeightError(f"{prefix}: weight has NaN values, or is missing from the checkpoint; {convert.FIX}")


def _one_scale(weight: torch.Tensor) -> float | None:
    """The scale of a compiled ternary weight that has one for all, else None."""
    scales = weight.packed.tensors["scales"] if isinstance(weight, PackedTensor) else weight.new_empty(0)
    return scales.item() if scales.numel() == 1 else None


@dataclasses.dataclass
class Loading:
    """Packs a model's projections and sums up what happened; one per model load.

    Attributes:
        report: what became of every projection.
        claimed: config.json says BitNet, so `bitnet` has to be known before weights come.
        bitnet: how a BitNet checkpoint stores its layers; None for others.
        scales: exact scale of HF modules that have one, where the engine's dtype rounds it.
        activations: what a compiled checkpoint says of its ternary modules, by HF name.
        compiled: the HF modules that came compiled.
        heads: output heads converted as option `lm_head` asks.
        handed: layers that took compiled weights as they are stored, never dense.
        refused: the modules that are dense as their device has no kernel for them, by that reason.
        scratch: for joining their parts.
    """

    report: Report = dataclasses.field(default_factory=Report)
    claimed: bool = False
    bitnet: BitNet | None = None
    scales: dict[str, float] = dataclasses.field(default_factory=dict)
    activations: dict[str, str] = dataclasses.field(default_factory=dict)
    compiled: frozenset[str] = frozenset()
    heads: int = 0
    handed: int = 0
    refused: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    scratch: Scratch = dataclasses.field(default_factory=Scratch)

    def weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        modules: Mapping[str, checkpoint.ModuleEntry],
        options: Options,
        dtype: torch.dtype,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors as the engine wants them: dense, changed if asked, not yet sharded.

        A compiled checkpoint (one with `modules`) is never changed again. `dtype` is the engine's.
        """
        if self.claimed and self.bitnet is None:
            raise CheckpointError(
                "this BitNet checkpoint's headers could not be read before its weights came; "
                "use a folder with safetensors files on this disk"
            )
        self.activations = {n: e.attributes["activations"] for n, e in modules.items() if "activations" in e.attributes}
        self.compiled = frozenset(modules)
        stream = checkpoint.expand(weights, modules, PackedTensor)
        if self.bitnet is not None:
            stream = self.bitnet.expand(stream, convert.is_projection, dtype)
            self.scales = self.bitnet.scales
        for name, tensor in stream:
            module = name.removesuffix(".weight")
            entry = modules.get(module)
            if entry is not None and entry.format == "ternary" and entry.dtype == "float32" != str(dtype)[6:]:
                scale = _one_scale(tensor)
                if scale is not None:
                    self.scales[module] = scale
            is_weight = module != name and tensor.dim() == 2 and tensor.dtype in convert.PRUNABLE_DTYPES
            if not modules and is_weight and convert.is_projection(module):
                module_options = options.for_module(module)
                if module_options is not None:
                    tensor, what = convert.change_weight(module, tensor, module_options)
                    self.report.note(what)
            yield name, tensor

    def kernel_device(self, tensor: torch.Tensor) -> torch.device:
        """Whose kernels multiply by a weight that an engine put where it is."""
        return tensor.device

    def pack(
        self, module: str, weight: torch.Tensor, options: Options, device: torch.device, parts: int = 1
    ) -> tuple[PackedWeight | None, str]:
        """As convert.pack_weight; also dense, and warned of at the end, is what no kernel of the device runs.

        `parts`: how many of the checkpoint's projections it is.
        """
        reason = registry.missing(options.format, device.type) if options.format not in ("auto", "dense") else None
        packed = None
        if reason is None:
            packed, why = convert.pack_weight(module, weight, options, device)
            reason = None if packed is None else registry.refusal(packed, device.type)
            if reason is None:
                return packed, why
        self.refuse(module, reason)
        noted, changed = "pruned and rounded" if options.target_sparsity else "rounded", self.report.changed
        if options.values in LEVELS and options.format != "ternary" and changed[noted] > 0:
            # That values would be rounded was noted as the weight came, but they are only as it is packed.
            changed[noted] -= parts
            changed["pruned"] += parts if options.target_sparsity else 0
        return None, reason

    def refuse(self, module: str, reason: str) -> None:
        """Remember that a module is dense as its device has no kernel for it."""
        self.refused.setdefault(reason, []).append(module)

    def lower(self, module: str, packed: PackedWeight, device: torch.device) -> MachineWeight:
        """The machine form for a device. Raises what PackedWeight.lower does, naming the module."""
        try:
            return packed.lower(str(device))
        except SparseBackendError as error:
            raise type(error)(f"{module}: {error}") from None

    def convert(
        self,
        layer: torch.nn.Module,
        prefix: str,
        options: Options | None,
        reason: str,
        parts: Sequence[tuple[str, int]] = (),
    ) -> LayerKernel | None:
        """Pack the weight of an engine's layer in place; None if it stays dense.

        Args:
            layer: has `weight` [N, K], whole and of this rank.
            prefix: the engine's name of the layer.
            options: of this layer, None if it is left alone for `reason`.
            parts: (HF module, output features on this rank) of what the engine merged into it.

        Raises:
            WeightError: naming the module, for NaN or Inf.
        """
        weight = cast(torch.Tensor, layer.weight).data
        norms = self._norms(prefix, parts, weight.dtype)
        if options is None and norms:
            raise OptionError(f"{prefix}: cannot be left dense, its input has a norm of its own; change 'ignore'")
        if options is None:
            self.report.add_dense(prefix, weight.nbytes, reason)
            return None
        if self.compiled and options.values in LEVELS and not self.compiled.issuperset(name for name, _ in parts):
            options = dataclasses.replace(options, values=None)  # what compiling left dense is not rounded now
        trained = self.bitnet is not None or "int8" in {self.activations.get(name) for name, _ in parts}
        if options.activations is None and trained and options.format != "int8":  # which only keeps them
            options = dataclasses.replace(options, activations="int8")
        if norms:
            return self._convert_parts(layer, prefix, options, parts, norms)
        try:
            packed, reason = self.pack(prefix, weight, options, self.kernel_device(weight), len(parts) or 1)
        except WeightError:
            _refuse_nan(prefix, weight)
            raise
        if packed is None:
            _refuse_nan(prefix, weight)
            self.report.add_dense(prefix, weight.nbytes, reason)
            return None
        packed = self._exact(packed, parts)
        if packed.format in ("int8", "int4") and options.format == packed.format and parts and not self.compiled:
            self.report.note("rounded")
        return self.install(layer, prefix, packed)

    def install(self, layer: torch.nn.Module, prefix: str, packed: PackedWeight) -> LayerKernel:
        """Put the machine form of `packed` in place of a layer's `weight`, which nobody reads any more."""
        weight = cast(torch.Tensor, layer.weight)
        machine = self.lower(prefix, packed, self.kernel_device(weight))
        self.report.add_packed(prefix, packed.format, weight.nbytes, machine.nbytes)
        # Only ternary models are trained for activations that all ranks round alike.
        trained_int8 = packed.format == "ternary" and packed.attributes["activations"] == "int8"
        return LayerKernel(layer, machine, int8_activations=trained_int8)

    def _exact(self, packed: PackedWeight, parts: Sequence[tuple[str, int]]) -> PackedWeight:
        """The packed weight under its checkpoint's own scales, where the engine's dtype rounded them."""
        if packed.format != "ternary" or packed.attributes["group_size"] or not any(n in self.scales for n, _ in parts):
            return packed
        scales = packed.tensors["scales"].float().expand(packed.shape[0], 1).clone()
        first = 0
        for name, count in parts:
            if name in self.scales:
                scales[first : first + count] = self.scales[name]
            first += count
        return Ternary().rescale(packed, scales[:1].clone() if (scales == scales[0]).all() else scales)

    def convert_head(self, layer: torch.nn.Module, prefix: str, format: str) -> LayerKernel | None:
        """Pack the output head as option `lm_head` asks; None if it stays dense, for want of a kernel."""
        kernel = self.convert(layer, prefix, Options(format=format), "")
        self.heads += 1
        self.report.note("head" if kernel is not None else None)
        return kernel

    def _norms(self, prefix: str, parts: Sequence[tuple[str, int]], dtype: torch.dtype) -> list[torch.Tensor]:
        """The norm of each part's input, for BitNet layers that have their own (`use_rms_norm`)."""
        if self.bitnet is None or self.bitnet.rms_norm_eps is None:
            return []
        norms = [self.bitnet.norms.pop(name).to(dtype) for name, _ in parts if name in self.bitnet.norms]
        if norms and len(norms) != len(parts):
            raise CheckpointError(f"{prefix}: some of its parts have an rms_norm in the checkpoint, some have none")
        return norms

    def _convert_parts(
        self,
        layer: torch.nn.Module,
        prefix: str,
        options: Options,
        parts: Sequence[tuple[str, int]],
        norms: list[torch.Tensor],
    ) -> LayerKernel:
        """Pack the parts of a merged layer apart: each normalises and rounds its input for itself."""
        weight = cast(torch.Tensor, layer.weight).data
        if weight.shape[1] != norms[0].shape[0]:
            raise CheckpointError(
                f"{prefix}: its norm is over {norms[0].shape[0]} inputs, this rank has {weight.shape[1]} of them; "
                "serve checkpoints with use_rms_norm without tensor parallelism"
            )
        machines, device = [], self.kernel_device(weight)
        for part, (name, count) in zip(torch.split(weight, [count for _, count in parts]), parts, strict=True):
            packed, reason = self.pack(name, part.contiguous(), options, device)
            if packed is None:
                raise WeightError(f"{name}: cannot stay dense behind its own norm ({reason})")
            machines.append(self.lower(name, self._exact(packed, [(name, count)]), device))
        self.report.add_packed(prefix, machines[0].format, weight.nbytes, sum(m.nbytes for m in machines))
        eps = cast(BitNet, self.bitnet).rms_norm_eps
        return NormedKernel(layer, machines, norms, cast(float, eps))

    def digest(self) -> str:
        """Of what became of every projection: engines that cache compiled graphs must hash it."""
        layout = "|".join(f"{line.module}={line.format}" for line in self.report.lines)
        return hashlib.sha256(f"{__version__}|{layout}".encode()).hexdigest()

    def finish(self, options: Options, log: Callable[[str], Any], warn: Callable[[str], Any]) -> None:
        """Log the summary, warn of what has no kernel, and give freed memory back to the system.

        Raises:
            OptionError: the model has no projection this plugin could convert.
        """
        lines = self.report.lines
        if not any(line.reason != convert.IGNORED for line in lines):
            why = "'ignore' covers all of them" if lines else "none of its layers is a linear layer of the engine"
            raise OptionError(f"{QUANT_METHOD}: no projection to convert: {why}; change 'ignore' or drop the flag")
        if options.lm_head != "keep" and not self.heads:
            raise OptionError(
                f"option 'lm_head' = {options.lm_head!r}: this model's output head does not ask a quantization "
                "method in this engine; allowed: keep"
            )
        if self.bitnet is not None and self.bitnet.norms:
            raise CheckpointError(f"no layer of the engine took the norm of {next(iter(self.bitnet.norms))}")
        for what, count in (+self.report.changed).items():
            log(_CHANGES[what].format(count=count) + ": not the checkpoint's function any more")
        if self.bitnet is not None:
            kept = "bf16 activations as asked" if options.activations == "keep" else "int8 activations per token"
            log(f"BitNet checkpoint: {self.bitnet.kind}, {kept}")
        if options.values is not None or any(rule.get("values") for rule in options.rules):
            log("values converted as asked ('values'): rounding may change the checkpoint's function")
        for line in self.report.summary():
            log(line)
        for reason, modules in self.refused.items():
            more = f" and {len(modules) - _NAMED} more" if len(modules) > _NAMED else ""
            warn(f"dense, not as asked: {', '.join(modules[:_NAMED])}{more}: {reason}")
        if self.compiled:
            log(f"{self.handed} layers took their compiled weights as stored, the others by way of dense ones")
        if not self.report.packed_count:
            log(
                "nothing was packed: the model runs dense. To prune it: sparse-backend compile MODEL OUT --sparsity 0.5"
            )
        self.scratch = Scratch()
        release_memory()


def release_memory() -> None:
    """Give memory freed by packing back to the operating system (glibc keeps it otherwise)."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # not glibc: its allocator decides
        return
