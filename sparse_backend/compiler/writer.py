"""Writing a checkpoint: shards, their index, and the files beside them."""

from __future__ import annotations

import collections
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..packed import PackedWeight
from ..report import Report
from . import checkpoint
from .checkpoint import ModuleEntry
from .work import WorkFolder, sync

# A shard is held in memory until it is whole; an interrupted run loses at most one.
MAX_SHARD_BYTES = 1 << 29

CARD, SOURCE_CARD = "README.md", "README.source.md"


class Writer:
    """Collects tensors and writes a shard whenever enough have come.

    Attributes:
        report: what became of every projection, those of shards taken up included.
        bytes: of the tensors that wait.
        total_bytes: of the tensors in shards.
    """

    def __init__(self, work: WorkFolder | None, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """`work` None writes nothing and only counts."""
        self.work, self.max_shard_bytes = work, max_shard_bytes
        self.report = Report()
        self.total_bytes = 0
        for shard in work.shards if work is not None else ():
            self.total_bytes += shard.nbytes
            self.report.restore(shard.lines, shard.changed)
        self._reset()

    def _reset(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.modules: dict[str, dict[str, Any]] = {}
        self.results: list[str] = []
        self.bytes = 0
        self._lines, self._changed = len(self.report.lines), collections.Counter(self.report.changed)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor under its own name."""
        # A copy, always: a view of a mapped shard would keep all of its pages.
        self.tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        self.bytes += tensor.nbytes

    def add_packed(self, module: str, packed: PackedWeight) -> None:
        """The tensors of a packed module, with their checksums."""
        crcs = {}
        for name, tensor in packed.tensors.items():
            self.tensors[f"{module}.{packed.format}.{name}"] = tensor.contiguous()
            self.bytes += tensor.nbytes
            crcs[name] = checkpoint.checksum(tensor)
        dtype = str(packed.dtype).removeprefix("torch.")
        entry = ModuleEntry(packed.format, packed.shape, dtype, crcs, Path(), packed.attributes)
        self.modules[module] = entry.to_json()

    def done(self, result: str) -> None:
        """All that stands for `result` of the source's stream has been added."""
        self.results.append(result)
        if self.bytes >= self.max_shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a shard."""
        if not self.results:
            return
        if self.work is not None:
            path = self.work.folder / "shard.new"
            self._save(path)
            lines = [list(line.fields()) for line in self.report.lines[self._lines :]]
            self.work.add(
                path, nbytes=self.bytes, tensors=list(self.tensors), results=self.results, lines=lines,
                changed=dict(self.report.changed - self._changed),
            )  # fmt: skip
        self.total_bytes += self.bytes
        self._reset()

    def _save(self, path: Path) -> None:
        names = {n: (_DTYPE_NAMES[t.dtype], list(t.shape)) for n, t in self.tensors.items()}
        data = {
            "version": checkpoint.FORMAT_VERSION,
            "modules": self.modules,
            "crc32": checkpoint.header_checksum(names, self.modules),
        }
        save_file(self.tensors, path, metadata={"format": "pt", checkpoint.METADATA_KEY: json.dumps(data)})
        _order_metadata(path)
        path.chmod(0o644)  # safetensors leaves it to its owner alone
        sync(path)

    def finish(self, config: dict[str, Any], card: str, source: Path) -> None:
        """Everything of the checkpoint into `work.model`, the shards under their final names.

        Args:
            config: config.json.
            card: README.md; the source's own becomes README.source.md.
            source: folder of the files to copy.
        """
        assert self.work is not None
        folder, shards = self.work.model, self.work.shards
        copy_other_files(source, folder)
        write_json(folder / "config.json", config)
        (folder / CARD).write_text(card)
        sync(folder / CARD)
        weight_map = {}
        for i, shard in enumerate(shards, 1):
            final = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            self.work.path(i).rename(folder / final)
            weight_map.update(dict.fromkeys(shard.tensors, final))
        if len(shards) > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(folder / checkpoint.INDEX, index)


def _order_metadata(path: Path) -> None:
    """Put `format` first in a shard's metadata: safetensors writes its two entries in an order left to chance."""
    first, entry = b'{"__metadata__":{', b'"format":"pt"'
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        if not header.startswith(first + entry):
            start, found, end = header.partition(b"," + entry)  # a quote within the other value would be escaped
            assert found
            file.seek(8)
            file.write(first + entry + b"," + start[len(first) :] + end)


# safetensors' own names, as a shard's header spells them.
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file and wait until it is on disk."""
    path.write_text(json.dumps(data, indent=2) + "\n")
    sync(path)


def copy_other_files(source: Path, target: Path) -> None:
    """Copy all of a checkpoint that is neither weights nor config.json; README.md as README.source.md."""
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
        elif entry.name != CARD:
            shutil.copyfile(entry, target / entry.name)
        elif not (source / SOURCE_CARD).exists():  # of a compiled source, the card of what that was made from
            shutil.copyfile(entry, target / SOURCE_CARD)
