"""What every engine adapter shares: module names, options per projection, packing, the summary."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from .. import __version__
from ..compiler import checkpoint, convert
from ..errors import CheckpointError, OptionError, WeightError
from ..kernels import registry
from ..options import COMPILE_TIME_KEYS, QUANT_METHOD, Options
from ..packed import MachineWeight
from ..report import Report


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


@dataclasses.dataclass
class Names:
    """HF module names for an engine's module names.

    Attributes:
        merged: engine's merged projection -> HF parts, by last name part (qkv_proj -> q_proj, ...).
        renamed: engine module name -> HF module name, where they differ.
    """

    merged: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)

    def learn(self, hf_modules: Iterable[str], to_engine: Callable[[str], str | None]) -> None:
        """Fill `renamed` from the checkpoint's modules and the engine's own weight renaming."""
        for name in hf_modules:
            weight = to_engine(f"{name}.weight")
            if weight is not None:
                self.renamed[weight.removesuffix(".weight")] = name

    def hf_parts(self, prefix: str) -> list[str]:
        """HF names of the projections that the engine's module `prefix` holds."""
        parent, _, last = prefix.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in self.merged.get(last, [last])]
        return [self.renamed.get(part, part) for part in parts]


def options_for(options: Options, names: Names, prefix: str) -> tuple[Options | None, str]:
    """The options of one engine module; or None and why it is left alone.

    Raises:
        OptionError: parts that the engine merges have different formats.
    """
    parts = names.hf_parts(prefix)
    for part in parts:
        reason = convert.why_not_projection(part)
        if reason is not None:
            return None, reason
    per_part = [options.for_module(part) for part in parts]
    stored = {None if o is None else (o.format, o.values) for o in per_part}
    if len(stored) > 1:
        listed = ", ".join(f"{n}: {'ignored' if o is None else o.format}" for n, o in zip(parts, per_part, strict=True))
        raise OptionError(
            f"{prefix}: the engine merges {len(parts)} projections that 'rules' or 'ignore' treat differently "
            f"({listed}); give them the same format"
        )
    return per_part[0], convert.IGNORED


class ConfigAnswers:
    """What both engines ask of a quantisation config, with the same answers. Mixed in first."""

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


class LayerKernel:
    """The op of one engine layer and the names of the parameters it reads."""

    def __init__(self, layer: torch.nn.Module, machine: MachineWeight) -> None:
        """Replace the layer's dense weight by the machine form's tensors."""
        del layer.weight
        for name, tensor in machine.tensors.items():
            layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        self.names = tuple(machine.tensors)
        self.op = registry.kernel(machine.format).function()
        self.out_features = machine.shape[0]

    def __call__(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """y [..., N] = x [..., K] W^T + bias."""
        y: torch.Tensor = self.op(x, *[getattr(layer, name) for name in self.names], bias, self.out_features)
        return y


@dataclasses.dataclass
class Loading:
    """Packs a model's projections and sums up what happened; one per model load."""

    report: Report = dataclasses.field(default_factory=Report)
    pruned: int = 0

    def weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        modules: Mapping[str, checkpoint.ModuleEntry],
        options: Options,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors as the engine wants them: dense, pruned if asked, not yet sharded.

        A compiled checkpoint (one with `modules`) is never pruned again.
        """
        for name, tensor in checkpoint.expand(weights, modules):
            module = name.removesuffix(".weight")
            is_weight = module != name and tensor.dim() == 2 and tensor.dtype in convert.PRUNABLE_DTYPES
            if not modules and is_weight and convert.why_not_projection(module) is None:
                module_options = options.for_module(module)
                if module_options is not None and module_options.sparsity:
                    tensor = convert.prune_weight(module, tensor, module_options)
                    self.pruned += 1
            yield name, tensor

    def convert(self, layer: torch.nn.Module, prefix: str, options: Options | None, reason: str) -> LayerKernel | None:
        """Pack the weight of an engine's layer in place; None if it stays dense.

        Args:
            layer: has `weight` [N, K], whole and of this rank.
            prefix: the engine's name of the layer.
            options: of this layer, None if it is left alone for `reason`.

        Raises:
            WeightError: naming the module, for NaN or Inf.
        """
        weight = cast(torch.Tensor, layer.weight).data
        if options is None:
            self.report.add_dense(prefix, weight.nbytes, reason)
            return None
        if torch.isnan(weight).any():
            raise WeightError(f"{prefix}: weight has NaN values, or is missing from the checkpoint; {convert.FIX}")
        packed, reason = convert.pack_weight(prefix, weight, options)
        if packed is None:
            self.report.add_dense(prefix, weight.nbytes, reason)
            return None
        registry.select(packed.format, weight.device.type, packed.dtype)
        machine = packed.lower()
        self.report.add_packed(prefix, packed.format, weight.nbytes, machine.nbytes)
        return LayerKernel(layer, machine)

    def digest(self) -> str:
        """Of what became of every projection: engines that cache compiled graphs must hash it."""
        layout = "|".join(f"{line.module}={line.format}" for line in self.report.lines)
        return hashlib.sha256(f"{__version__}|{layout}".encode()).hexdigest()

    def finish(self, options: Options, log: Callable[[str], Any]) -> None:
        """Log the summary and give freed memory back to the system.

        Raises:
            OptionError: the model has no projection this plugin could convert.
        """
        lines = self.report.lines
        if not any(line.reason != convert.IGNORED for line in lines):
            why = "'ignore' covers all of them" if lines else "none of its layers is a linear layer of the engine"
            raise OptionError(f"{QUANT_METHOD}: no projection to convert: {why}; change 'ignore' or drop the flag")
        if self.pruned:
            log(f"{self.pruned} projections pruned as asked ('sparsity'): not the checkpoint's function any more")
        if options.values is not None or any(rule.get("values") for rule in options.rules):
            log("values converted as asked ('values'): rounding may change the checkpoint's function")
        for line in self.report.summary():
            log(line)
        if not self.report.packed_count:
            log(
                "nothing was packed: the model runs dense. To prune it: sparse-backend compile MODEL OUT --sparsity 0.5"
            )
        release_memory()


def release_memory() -> None:
    """Give memory freed by packing back to the operating system (glibc keeps it otherwise)."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # not glibc: its allocator decides
        return
