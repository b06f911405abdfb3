"""Reading checkpoints in HF layout, plain and compiled.

A compiled checkpoint holds, for every packed module, the tensors of its canonical form as
`<HF module>.<format>.<tensor>`. Each safetensors shard's metadata carries, under
`sparse_backend`, the format version, per module the format, shape, dtype and checksums, and
one checksum over all names, dtypes and shapes of the shard: a flipped bit in a header is an
error here, not a wrong token later.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from isal import isal_zlib
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, WeightError
from ..formats import FORMATS, get_format
from ..packed import PackedWeight

METADATA_KEY = "sparse_backend"
FORMAT_VERSION = 1
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
INDEX = "model.safetensors.index.json"
RECOMPILE = "compile the original checkpoint again"


@dataclasses.dataclass(frozen=True)
class ModuleEntry:
    """What a shard's metadata says of one packed module."""

    format: str
    shape: tuple[int, int]
    dtype: str
    crc32: Mapping[str, int]
    file: Path
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the stored values; KeyError for one this version does not know."""
        return _DTYPES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        """The metadata's form of the entry; the file is where it is written."""
        entry = {"format": self.format, "shape": list(self.shape), "dtype": self.dtype, "crc32": dict(self.crc32)}
        return {**entry, "attributes": dict(self.attributes)} if self.attributes else entry


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The headers of a checkpoint; no tensor is read.

    Attributes:
        folder: where it is.
        files: its shards, sorted.
        config: config.json.
        modules: packed modules by HF name; empty for a plain checkpoint.
        tensors: every tensor's (dtype, shape) by name.
    """

    folder: Path
    files: tuple[Path, ...]
    config: dict[str, Any]
    modules: dict[str, ModuleEntry]
    tensors: dict[str, tuple[str, tuple[int, ...]]]

    def module_names(self) -> list[str]:
        """HF names of all modules with a 2-D weight, packed or not."""
        dense = [
            n.removesuffix(".weight")
            for n, (_, shape) in self.tensors.items()
            if n.endswith(".weight") and len(shape) == 2
        ]
        return sorted({*dense, *self.modules})


def bits_of(dtype: str) -> int:
    """Bits of an element, for a dtype as safetensors' headers spell it (BF16, F8_E4M3, BOOL, ...)."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    flat = tensor.contiguous().view(-1)
    return isal_zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def header_checksum(tensors: Mapping[str, tuple[str, Iterable[int]]], modules: Mapping[str, Any]) -> int:
    """CRC-32 over names, dtypes and shapes of a shard and its module entries."""
    header = {name: [dtype, list(shape)] for name, (dtype, shape) in tensors.items()}
    return isal_zlib.crc32(json.dumps([header, modules], sort_keys=True).encode())


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises:
        CheckpointError: no folder, no config.json, or not JSON.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the path of a checkpoint in Hugging Face layout")
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no config.json; give the path of a checkpoint in Hugging Face layout")
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return config


def open_shard(path: Path) -> Any:
    """safe_open with errors that name the file."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not safetensors ({error}); copy it again or {RECOMPILE}") from None


def read(folder: str | Path) -> Checkpoint:
    """Read and check every header of a checkpoint.

    Raises:
        CheckpointError: naming the file, for anything missing, truncated, altered, or of
            another format version.
    """
    folder = Path(folder)
    config = read_config(folder)
    index = _read_index(folder)
    names = set(index.values()) if index else {p.name for p in folder.glob("*.safetensors") if not _is_copy(p.name)}
    absent = _absent(names)
    if absent is not None:
        raise CheckpointError(f"{folder / absent}: is not there; a shard is missing")
    files = tuple(folder / name for name in sorted(names))
    if not files:
        raise CheckpointError(f"{folder}: has no .safetensors files; save the model with safe_serialization=True")
    modules: dict[str, ModuleEntry] = {}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in files:
        shard, entries = _read_shard(path)
        twice = sorted(shard.keys() & tensors.keys())
        if twice:
            raise CheckpointError(f"{path}: holds {twice[0]}, which another shard holds too; remove the stale file")
        tensors.update(shard)
        modules.update(entries)
    missing = [name for name in index if name not in tensors]
    if missing:
        text = f"lists {missing[0]} (and {len(missing) - 1} more) that no shard holds; a shard is missing"
        raise CheckpointError(f"{folder / INDEX}: {text}")
    return Checkpoint(folder, files, config, modules, tensors)


def _is_copy(name: str) -> bool:
    """Whether a file holds the same weights under other names, or only changes to them."""
    return name.startswith(("consolidated", "adapter_"))


def _absent(names: Collection[str]) -> str | None:
    """The first shard that the others' names (`model-00001-of-00002`) count and that is not among them."""
    for name in sorted(names):
        found = re.fullmatch(r"(.+-)(\d+)(-of-(\d+)\.safetensors)", name)
        if found is None:
            continue
        first, number, last, count = found.groups()
        for i in range(1, int(count) + 1):
            other = f"{first}{i:0{len(number)}d}{last}"
            if other not in names:
                return other
    return None


def _read_index(folder: Path) -> dict[str, str]:
    """The index's tensor name -> file name; empty without an index."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        names = json.loads(path.read_text())["weight_map"]
        if not all(isinstance(v, str) for v in names.values()):
            raise ValueError("a file name is no string")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as an index: {error}") from None
    absent = sorted({file for file in names.values() if not (folder / file).is_file()})
    if absent:
        raise CheckpointError(f"{path}: names {absent[0]}, which is not there; a shard is missing")
    return dict(names)


def _read_shard(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, ModuleEntry]]:
    with open_shard(path) as shard:
        tensors = {}
        for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
            view = shard.get_slice(name)
            tensors[name] = (str(view.get_dtype()), tuple(view.get_shape()))
        metadata = shard.metadata() or {}
    if METADATA_KEY not in metadata:
        packed = [n for n in tensors if n.count(".") >= 2 and n.split(".")[-2] in FORMATS]
        if packed:
            raise CheckpointError(f"{path}: holds {packed[0]} but no sparse_backend metadata; {RECOMPILE}")
        return tensors, {}
    try:
        data = json.loads(metadata[METADATA_KEY])
        version, entries, crc = data["version"], data["modules"], data["crc32"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: its sparse_backend metadata is damaged; {RECOMPILE}") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version}, this sparse_backend reads {FORMAT_VERSION}; "
            f"{RECOMPILE} or install the version that wrote it"
        )
    if crc != header_checksum(tensors, entries):
        raise CheckpointError(
            f"{path}: its header does not match its checksum, so it was altered or damaged; {RECOMPILE}"
        )
    modules = {}
    for name, e in entries.items():
        shape = (e["shape"][0], e["shape"][1])
        entry = ModuleEntry(e["format"], shape, e["dtype"], e["crc32"], path, e.get("attributes", {}))
        for tensor in get_format(entry.format).specs(entry.attributes):
            if f"{name}.{entry.format}.{tensor.name}" not in tensors:
                raise CheckpointError(f"{path}: module {name} lacks its tensor '{tensor.name}'; {RECOMPILE}")
        modules[name] = entry
    return tensors, modules


def assemble(name: str, entry: ModuleEntry, tensors: dict[str, torch.Tensor]) -> PackedWeight:
    """The packed weight of one module, its checksums verified.

    Raises:
        CheckpointError: naming file and module.
    """
    try:
        for key, tensor in tensors.items():
            if checksum(tensor) != entry.crc32[key]:
                raise WeightError(f"tensor '{key}' does not match its checksum")
        return PackedWeight(entry.format, entry.shape, entry.torch_dtype, tensors, dict(entry.attributes))
    except (WeightError, KeyError) as error:
        raise CheckpointError(f"{entry.file}: module {name} is damaged ({error}); {RECOMPILE}") from None


def expand(
    weights: Iterable[tuple[str, torch.Tensor]],
    modules: Mapping[str, ModuleEntry],
    wrap: Callable[[str, PackedWeight, Callable[[], torch.Tensor]], torch.Tensor] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Replace the tensors of packed modules, as they pass, by one dense `<module>.weight`.

    Lets an engine shard and merge with its own code. Holds at most the modules whose tensors
    have come in part.

    Args:
        weights: (name, tensor) as stored.
        modules: the packed ones.
        wrap: what to yield for (module, packed weight, function that unpacks it) instead of the dense weight.

    Raises:
        CheckpointError: a tensor is damaged, or a module never became whole.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, tensor in weights:
        module, _, rest = full_name.rpartition(".")
        module, _, format_name = module.rpartition(".")
        entry = modules.get(module)
        if entry is None and format_name in FORMATS:
            raise CheckpointError(f"{full_name}: a compiled tensor without metadata; {RECOMPILE}")
        if entry is None or entry.format != format_name:
            yield full_name, tensor
            continue
        parts = waiting.setdefault(module, {})
        parts[rest] = tensor
        if len(parts) == len(get_format(entry.format).specs(entry.attributes)):
            del waiting[module]
            packed = assemble(module, entry, parts)
            unpack = partial(_unpack, module, entry, packed)
            yield f"{module}.weight", unpack() if wrap is None else wrap(module, packed, unpack)
    if waiting:
        name = next(iter(waiting))
        raise CheckpointError(f"{modules[name].file}: module {name} came without all its tensors; {RECOMPILE}")


def _unpack(module: str, entry: ModuleEntry, packed: PackedWeight) -> torch.Tensor:
    try:
        return packed.unpack()
    except WeightError as error:
        raise CheckpointError(f"{entry.file}: module {module} is damaged ({error}); {RECOMPILE}") from None
