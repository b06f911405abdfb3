"""What becomes of one weight, and how compiled shards are written: for the CLI and the engines."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..api import convert_values
from ..errors import WeightError
from ..formats import get_format
from ..options import Options
from ..packed import PackedWeight
from . import checkpoint, plan, prune
from .checkpoint import ModuleEntry

# Modules with a 2-D weight that are no linear projection, or that decide rather than
# project: look-ups, output heads, classifiers, routers. Compared with whole name parts.
_NOT_PROJECTIONS = re.compile(
    r"(^|\.)(embed\w*|\w*embed|\w*embedding(s|_table)?|wte|wpe|shared|lm_head|output_layer|score|classifier|pooler|"
    r"router|gate|shared_expert_gate|relative_attention_bias)(\.|$)|(^|\.)output$"
)
_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")

MAX_SHARD_BYTES = 1 << 30

IGNORED = "in 'ignore'"
FIX = "fix the checkpoint or add the module to 'ignore'"
# Anything else is quantised codes or not a weight.
PRUNABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not_projection(module: str) -> str | None:
    """Why a module's 2-D weight is left alone, or None if it is a linear projection."""
    if _NOT_PROJECTIONS.search(module):
        return "embedding, head or router"
    if _EXPERTS.search(module):
        return "fused experts have no sparse kernel yet"
    return None


def is_projection(module: str) -> bool:
    """Whether a module's 2-D weight is a linear projection."""
    return why_not_projection(module) is None


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype config.json names for the model's weights; bfloat16 if it names none."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    dtype = getattr(torch, name, None)
    return dtype if dtype in PRUNABLE_DTYPES else torch.bfloat16


def change_weight(module: str, weight: torch.Tensor, options: Options) -> tuple[torch.Tensor, str | None]:
    """The weight of one HF module as its options ask for, and what that was: `pruned`, `rounded` or None.

    What depends on the whole weight happens here, before an engine shards it.

    Raises:
        WeightError: naming the module.
    """
    what = None
    try:
        if options.sparsity:
            weight, what = prune.METHODS[options.method](weight, options.sparsity), "pruned"
        if options.format == "ternary":
            ternary = get_format("ternary").round(weight, options)
            weight, what = ternary, what if ternary is weight else "rounded"
        elif options.values in ("int8", "int4") and options.format != "dense":
            what = f"{what} and rounded" if what else "rounded"  # as it packs
    except WeightError as error:
        raise WeightError(f"{module}: {error}; {FIX}") from None
    return weight, what


def pack_weight(module: str, weight: torch.Tensor, options: Options) -> tuple[PackedWeight | None, str]:
    """Pack one weight as its options say: (packed or None for dense, reason).

    Raises:
        WeightError: naming the module.
    """
    try:
        weight = convert_values(weight, options.values)
        decision = plan.choose(weight, options)
        return None if decision.pack is None else decision.pack(), decision.reason
    except WeightError as error:
        raise WeightError(f"{module}: {error}; {FIX}") from None


class Writer:
    """Collects tensors and writes a shard whenever enough have come."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[tuple[Path, list[str]]] = []
        self.total_bytes = 0
        self._reset()

    def _reset(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.modules: dict[str, dict[str, Any]] = {}
        self.bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor under its own name."""
        self.tensors[name] = tensor.contiguous()
        self.bytes += tensor.nbytes

    def add_packed(self, module: str, packed: PackedWeight) -> None:
        """The tensors of a packed module, with their checksums."""
        crcs = {}
        for name, tensor in packed.tensors.items():
            self.add(f"{module}.{packed.format}.{name}", tensor)
            crcs[name] = checkpoint.checksum(tensor)
        dtype = str(packed.dtype).removeprefix("torch.")
        self.modules[module] = ModuleEntry(
            packed.format, packed.shape, dtype, crcs, self.folder, packed.attributes
        ).to_json()

    def flush(self, at_least: int = 0) -> None:
        """Write a shard if at least so many bytes are waiting."""
        if not self.tensors or self.bytes < at_least:
            return
        path = self.folder / f"shard-{len(self.shards) + 1}.safetensors"
        names = {n: (_DTYPE_NAMES[t.dtype], list(t.shape)) for n, t in self.tensors.items()}
        data = {
            "version": checkpoint.FORMAT_VERSION,
            "modules": self.modules,
            "crc32": checkpoint.header_checksum(names, self.modules),
        }
        save_file(self.tensors, path, metadata={"format": "pt", checkpoint.METADATA_KEY: json.dumps(data)})
        path.chmod(0o644)  # safetensors leaves it to its owner alone
        _sync(path)
        self.shards.append((path, list(self.tensors)))
        self.total_bytes += self.bytes
        self._reset()

    def finish(self) -> None:
        """Give the shards their final names and write the index."""
        self.flush()
        if len(self.shards) == 1:
            self.shards[0][0].rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for i, (path, names) in enumerate(self.shards, 1):
            final = f"model-{i:05d}-of-{len(self.shards):05d}.safetensors"
            path.rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_json(self.folder / "model.safetensors.index.json", index)


# safetensors' own names, as a shard's header spells them.
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def _sync(path: Path) -> None:
    with path.open("rb") as f:
        os.fsync(f.fileno())


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file and wait until it is on disk."""
    path.write_text(json.dumps(data, indent=2) + "\n")
    _sync(path)


def copy_other_files(source: Path, target: Path) -> None:
    """Copy all of a checkpoint that is neither weights nor config.json."""
    for entry in sorted(source.iterdir()):
        if entry.name.startswith(".") or entry.name == "config.json":
            continue
        if entry.name.endswith((*checkpoint.WEIGHT_SUFFIXES, ".index.json")):
            continue
        if entry.is_dir():
            # A folder's safetensors may be part of the model (sentence-transformers' 2_Dense);
            # other weight files there are copies of it in another format.
            others = (f"*{s}" for s in checkpoint.WEIGHT_SUFFIXES if s != ".safetensors")
            shutil.copytree(entry, target / entry.name, ignore=shutil.ignore_patterns(*others))
        else:
            shutil.copyfile(entry, target / entry.name)
