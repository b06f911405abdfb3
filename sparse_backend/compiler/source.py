"""The checkpoint that is compiled: its tensors as one stream, plain and dense, and what its config.json says."""

from __future__ import annotations

import collections
import difflib
import importlib.util
import math
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..errors import CheckpointError
from ..options import Options, matches
from . import bitnet, checkpoint, convert

Progress = Callable[[int, int, str], None]

# A mapping's pages count as this process's memory until it is closed: shards are opened anew after so many bytes.
MAPPED_BYTES = 128 << 20


class Source:
    """A checkpoint of any kind that can be compiled.

    Attributes:
        info: its headers.
        bitnet: how it stores BitNet layers; None if it is no BitNet checkpoint.
        total_bytes: of its shards.
        done_bytes: of them read (or skipped) so far.
    """

    def __init__(self, info: checkpoint.Checkpoint) -> None:
        self.info = info
        self.bitnet = bitnet.BitNet.of(info.config, info.tensors)
        self.total_bytes = sum(path.stat().st_size for path in info.files)
        self.done_bytes = 0

    def weights(self, finished: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of everything, packed and BitNet layers as dense `<module>.weight`.

        The order depends on the checkpoint alone.

        Args:
            finished: names that are not wanted again; what only they need is not read.

        Raises:
            CheckpointError: naming the file or module that cannot be read.
        """
        stream = checkpoint.expand(self._stored(finished), self.info.modules)
        if self.bitnet is not None:
            stream = self.bitnet.expand(stream, convert.is_projection, convert.model_dtype(self.info.config))
        for name, tensor in stream:
            if name not in finished:
                yield name, tensor

    def _stored(self, finished: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        self.done_bytes = 0
        for path in self.info.files:
            with checkpoint.open_shard(path) as shard:
                names = collections.deque(shard.keys())
            while names:
                mapped = 0
                with checkpoint.open_shard(path) as shard:
                    while names and mapped < MAPPED_BYTES:
                        name = names.popleft()
                        size = self._size(name)
                        self.done_bytes += size
                        if self._result(name) in finished:
                            continue
                        mapped += size
                        try:
                            tensor = shard.get_tensor(name)
                        except (OSError, SafetensorError) as error:
                            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from None
                        yield name, tensor
                        del tensor

    def _size(self, name: str) -> int:
        dtype, shape = self.info.tensors[name]
        return math.prod(shape) * checkpoint.bits_of(dtype) // 8

    def _result(self, name: str) -> str:
        """The tensor of the stream that is the last one to need this one."""
        module, _, _ = name.rpartition(".")
        owner, _, format_name = module.rpartition(".")
        entry = self.info.modules.get(owner)
        if entry is not None and entry.format == format_name:
            return f"{owner}.weight"
        if self.bitnet is not None:
            return self.bitnet.last_result(name)
        return name


def unfitting(info: checkpoint.Checkpoint, options: Options) -> list[str]:
    """A warning for every pattern of `ignore` and `rules` that fits no module, with the module it comes nearest to."""
    modules = info.module_names()
    # Of other tensors too (norms, experts in one tensor), and the head that a model may share with its embedding:
    # naming those changes nothing, and is no slip.
    owners = {n.rpartition(".")[0] for n in info.tensors} | info.tensors.keys()
    names = {*modules, *owners, "lm_head"}
    patterns = [("ignore", p) for p in options.ignore] + [("rules", r["match"]) for r in options.rules]
    warnings = []
    for key, pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            near = _nearest(pattern, modules)
            hint = f"; the nearest is {near}" if near else ""
            warnings.append(f"option '{key}': no module fits {pattern!r}{hint}")
    return list(dict.fromkeys(warnings))


def _nearest(pattern: str, modules: list[str]) -> str | None:
    """The module whose name, or else its last part, is nearly what a pattern says."""
    whole = difflib.get_close_matches(pattern, modules, 1, 0.9)
    if whole:
        return whole[0]
    by_part = {name.rpartition(".")[2]: name for name in reversed(modules)}
    words = re.findall(r"\w+", pattern)
    near = difflib.get_close_matches(words[-1], by_part, 1) if words else []
    return by_part[near[0]] if near else None


def why_unknown(config: dict[str, object]) -> str | None:
    """Why a config.json names no architecture that is known here, or None if it does.

    What it names is looked up in an installed transformers' table without importing it (seconds). Without
    transformers, any name will do.
    """
    model_type = config.get("model_type")
    if not model_type and not config.get("architectures"):
        return "config.json names neither architectures nor a model_type"
    if not model_type or config.get("auto_map"):  # with auto_map, the model's own code says what it is
        return None
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return None
    auto = Path(next(iter(spec.submodule_search_locations))) / "models" / "auto"
    tables = [auto / name for name in ("auto_mappings.py", "configuration_auto.py")]
    texts = [table.read_text() for table in tables if table.is_file()]
    if not texts or any(f'"{model_type}"' in text for text in texts):
        return None
    return f"this environment's transformers knows no model_type '{model_type}'"
