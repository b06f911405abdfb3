"""Turn a plain checkpoint into a compiled one, tensor by tensor."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..api import convert_values, pack
from ..errors import CheckpointError, OptionError, WeightError
from ..options import Options
from ..packed import PackedWeight
from ..report import Report
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


def prune_weight(module: str, weight: torch.Tensor, options: Options) -> torch.Tensor:
    """The weight of one HF module, pruned as its options say.

    Raises:
        WeightError: naming the module.
    """
    if not options.sparsity:
        return weight
    try:
        return prune.METHODS[options.method](weight, options.sparsity)
    except WeightError as error:
        raise WeightError(f"{module}: {error}; {FIX}") from None


def pack_weight(module: str, weight: torch.Tensor, options: Options) -> tuple[PackedWeight | None, str]:
    """Pack one weight as its options say: (packed or None for dense, reason).

    Raises:
        WeightError: naming the module.
    """
    try:
        if options.values is not None:
            weight = convert_values(weight, options.values)
        decision = plan.choose(weight, options)
        if decision.format == "dense":
            return None, decision.reason
        return pack(weight, decision.format), decision.reason
    except WeightError as error:
        raise WeightError(f"{module}: {error}; {FIX}") from None


class _Writer:
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
        self.tensors[name] = tensor.contiguous()
        self.bytes += tensor.nbytes

    def add_packed(self, module: str, packed: PackedWeight) -> None:
        crcs = {}
        for name, tensor in packed.tensors.items():
            self.add(f"{module}.{packed.format}.{name}", tensor)
            crcs[name] = checkpoint.checksum(tensor)
        dtype = str(packed.dtype).removeprefix("torch.")
        self.modules[module] = ModuleEntry(packed.format, packed.shape, dtype, crcs, self.folder).to_json()

    def flush(self, at_least: int = 0) -> None:
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
        _write_json(self.folder / "model.safetensors.index.json", index)


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


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
    _sync(path)


def _copy_other_files(source: Path, target: Path) -> None:
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


def compile_checkpoint(
    source: str | Path,
    target: str | Path,
    options: Options,
    progress: Callable[[int, int, str], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Report:
    """Write a compiled copy of a plain checkpoint.

    Reads one tensor at a time and holds at most one output shard. The result appears under
    its name only when it is whole; the source is only read.

    Args:
        source: folder in HF layout with safetensors shards.
        target: folder to create.
        options: what to do; written to config.json.
        progress: called as (bytes done, bytes in all, tensor name).
        max_shard_bytes: size at which an output shard is closed.

    Returns:
        What became of every projection.

    Raises:
        CheckpointError: the source cannot be read, the target exists or cannot be written.
        WeightError: a weight holds NaN or Inf.
        OptionError: nothing would be packed.
    """
    source, target = Path(source), Path(target)
    info = checkpoint.read(source)
    quantization = info.config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(f"{source}: is already quantised ({method}); compile the original checkpoint")
    if target.exists():
        raise CheckpointError(f"{target}: exists already; remove it or choose another name")
    if not any(
        n.endswith(".weight") and why_not_projection(n.removesuffix(".weight")) is None and len(shape) == 2
        for n, (_, shape) in info.tensors.items()
    ):
        raise CheckpointError(f"{source}: has no linear projection to convert (no 2-D '<module>.weight' tensor)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.incomplete-", dir=target.parent))
        work.chmod(0o755)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error}") from None
    try:
        report = _convert(info, work, options, progress, max_shard_bytes)
        _copy_other_files(source, work)
        _write_json(work / "config.json", {**info.config, "quantization_config": options.to_dict()})
        work.rename(target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: cannot be written: {error}; nothing was left behind") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def _convert(
    info: checkpoint.Checkpoint,
    work: Path,
    options: Options,
    progress: Callable[[int, int, str], None] | None,
    max_shard_bytes: int,
) -> Report:
    report = Report()
    writer = _Writer(work)
    total = sum(path.stat().st_size for path in info.files)
    done = 0
    for path in info.files:
        with checkpoint.open_shard(path) as shard:
            for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = shard.get_tensor(name)
                done += tensor.nbytes
                _convert_tensor(name, tensor, options, writer, report)
                writer.flush(max_shard_bytes)
                if progress is not None:
                    progress(done, total, name)
    if not report.packed_count:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in report.dense_reasons().items())
        raise OptionError(f"{info.folder}: nothing to pack ({reasons or 'no projection'}); pass --sparsity to prune")
    writer.finish()
    return report


def _convert_tensor(name: str, tensor: torch.Tensor, options: Options, writer: _Writer, report: Report) -> None:
    module = name.removesuffix(".weight")
    if module == name or tensor.dim() != 2:
        return writer.add(name, tensor)
    reason = why_not_projection(module)
    module_options = options.for_module(module)
    if reason is None and module_options is None:
        reason = IGNORED
    if reason is None and tensor.dtype not in PRUNABLE_DTYPES:
        reason = f"{str(tensor.dtype).removeprefix('torch.')} weights are left as they are"
    packed = None
    if reason is None and module_options is not None:
        tensor = prune_weight(module, tensor, module_options)
        packed, reason = pack_weight(module, tensor, module_options)
    if packed is None:
        writer.add(name, tensor)
        report.add_dense(module, tensor.nbytes, reason or "")
    else:
        writer.add_packed(module, packed)
        report.add_packed(module, packed.format, tensor.nbytes, packed.nbytes)
