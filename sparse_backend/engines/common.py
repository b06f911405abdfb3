"""What every engine adapter shares: module names, options per projection, packing, the summary."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from ..compiler import checkpoint, convert
from ..errors import CheckpointError, OptionError
from ..kernels import registry
from ..options import COMPILE_TIME_KEYS, QUANT_METHOD, Options
from ..packed import MachineWeight
from ..report import Report

IGNORED = "in 'ignore'"


def read_checkpoint(model: str) -> checkpoint.Checkpoint | None:
    """Headers of a model that is on this disk, as a folder or in the hub cache; else None.

    Raises:
        CheckpointError: it is there and damaged.
    """
    folder = Path(model)
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(model, local_files_only=True))
        except Exception:  # not a hub name, not cached: the engine will say so itself
            return None
    if not any(folder.glob("*.safetensors")):
        return None
    return checkpoint.read(folder)


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


def options_for(options: Options, names: Names, prefix: str) -> Options | None:
    """The options of one engine module, None if ignored.

    Raises:
        OptionError: parts that the engine merges have different formats.
    """
    parts = names.hf_parts(prefix)
    per_part = [options.for_module(part) for part in parts]
    stored = {None if o is None else (o.format, o.values) for o in per_part}
    if len(stored) > 1:
        listed = ", ".join(f"{n}: {'ignored' if o is None else o.format}" for n, o in zip(parts, per_part, strict=True))
        raise OptionError(
            f"{prefix}: the engine merges {len(parts)} projections that 'rules' or 'ignore' treat differently "
            f"({listed}); give them the same format"
        )
    return per_part[0]


def prune_stream(
    weights: Iterable[tuple[str, torch.Tensor]], options: Options, already_pruned: Iterable[str] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Prune whole HF weights as they are loaded, before the engine shards them."""
    done = set(already_pruned)
    for name, tensor in weights:
        module = name.removesuffix(".weight")
        if module != name and tensor.dim() == 2 and module not in done and convert.why_not_projection(module) is None:
            module_options = options.for_module(module)
            if module_options is not None:
                tensor = convert.prune_weight(module, tensor, module_options)
        yield name, tensor


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

    def convert(self, layer: torch.nn.Module, prefix: str, options: Options | None) -> LayerKernel | None:
        """Pack the weight of an engine's layer in place; None if it stays dense.

        Args:
            layer: has `weight` [N, K], whole and of this rank.
            prefix: the engine's name of the layer.
            options: of this layer, None if it is ignored.

        Raises:
            WeightError: naming the module, for NaN or Inf.
        """
        weight = cast(torch.Tensor, layer.weight).data
        if options is None:
            self.report.add_dense(prefix, weight.nbytes, IGNORED)
            return None
        packed, reason = convert.pack_weight(prefix, weight, options)
        if packed is None:
            self.report.add_dense(prefix, weight.nbytes, reason)
            return None
        registry.select(packed.format, weight.device.type, packed.dtype)
        machine = packed.lower()
        self.report.add_packed(prefix, packed.format, weight.nbytes, machine.nbytes)
        return LayerKernel(layer, machine)

    def finish(self, options: Options, log: Callable[[str], Any]) -> None:
        """Log the summary and give freed memory back to the system.

        Raises:
            OptionError: the model has no projection this plugin could convert.
        """
        lines = self.report.lines
        if not any(line.reason != IGNORED for line in lines):
            why = "'ignore' covers all of them" if lines else "none of its layers is a linear layer of the engine"
            raise OptionError(f"{QUANT_METHOD}: no projection to convert: {why}; change 'ignore' or drop the flag")
        if options.sparsity or any(rule.get("sparsity") for rule in options.rules):
            log("pruned as asked ('sparsity'): the model's function differs from the checkpoint's")
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
