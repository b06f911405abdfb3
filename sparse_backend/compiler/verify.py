"""Whether a compiled checkpoint holds what its source and its options say, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..api import convert_values
from ..errors import CheckpointError
from ..formats import get_format
from ..formats.base import TensorSpec
from ..options import QUANT_METHOD, Options
from . import bitnet, checkpoint, convert
from .source import Progress, Source

# (module, weight [N, K], its options) -> the weight as they change it, and what that was, as convert.change_weight.
Change = Callable[[str, torch.Tensor, Options], tuple[torch.Tensor, str | None]]


def verify_checkpoint(
    source: str | Path,
    compiled: str | Path,
    progress: Progress | None = None,
    change: Change = convert.change_weight,
) -> int:
    """Read a compiled checkpoint back and compare it with its source.

    A projection must equal, bit for bit (-0.0 is 0.0), the source's weight after the pruning and rounding that
    config.json says; every other tensor the source's bytes. In layout `bitnet`, whose scales have the model's dtype,
    codes must be equal and scales to that dtype's precision.

    Args:
        source, compiled: folders.
        progress: called as (bytes done, bytes in all, what is being done).
        change: what was done to weights before they were packed.

    Returns:
        How many tensors were compared.

    Raises:
        CheckpointError: naming the module or tensor that differs, is damaged, missing, or one too many.
    """
    original, result = Source(checkpoint.read(source)), _Result(checkpoint.read(compiled))
    left, count = result.names(), 0
    for name, tensor in original.weights():
        if name not in left:
            raise CheckpointError(f"{result.info.folder}: lacks {name}; {checkpoint.RECOMPILE}")
        left.remove(name)
        result.check(name, tensor, change)
        count += 1
        if progress is not None:
            progress(original.done_bytes, original.total_bytes, f"verifying {name}")
    if left:
        raise CheckpointError(f"{result.info.folder}: holds {min(left)}, which {source} does not")
    return count


class _Result:
    """The compiled checkpoint, read one module at a time."""

    def __init__(self, info: checkpoint.Checkpoint) -> None:
        self.info = info
        config = info.config.get("quantization_config") or {}
        ours = config.get("quant_method") == QUANT_METHOD
        self.options = Options.from_dict(config) if ours else Options()
        self.bitnet = None if ours else bitnet.BitNet.of(info.config, info.tensors)
        self.files: dict[str, Path] = {}
        for path in info.files:
            _forget(path)
            with checkpoint.open_shard(path) as shard:
                self.files.update(dict.fromkeys(shard.keys(), path))

    def names(self) -> set[str]:
        """Names of the dense tensors this stands for."""
        packed = {f"{m}.{e.format}.{s.name}" for m, e in self.info.modules.items() for s in _specs(e)}
        names = self.info.tensors.keys() - packed
        if self.bitnet is not None:
            names -= {n for n in names if n.endswith(".weight_scale")}
        return names | {f"{module}.weight" for module in self.info.modules}

    def check(self, name: str, tensor: torch.Tensor, change: Change) -> None:
        """CheckpointError unless `name` is here what `tensor` of the source becomes."""
        module = name.removesuffix(".weight")
        entry = self.info.modules.get(module) if module != name else None
        options = self.options.for_module(module)
        if entry is not None and options is not None:
            stored = checkpoint.assemble(
                module, entry, {s.name: self._read(f"{module}.{entry.format}.{s.name}") for s in _specs(entry)}
            ).unpack()
            expected = convert_values(change(module, tensor, options)[0], options.values)
            expected = get_format(entry.format).round(expected, options)
            same = stored.shape == expected.shape and torch.equal(stored.to(expected.dtype), expected)
        elif self.bitnet is not None and f"{module}.weight_scale" in self.files:
            same = self._same_ternary(module, tensor)
        else:
            if tensor.dim() == 2 and options is not None and self._may_have_changed(module, tensor):
                tensor = change(module, tensor, options)[0]
            stored = self._read(name)
            same = stored.dtype == tensor.dtype and stored.shape == tensor.shape and _same_bytes(stored, tensor)
        if not same:
            raise CheckpointError(
                f"{self.files.get(name, self.info.folder)}: module {module} is not what its source becomes under the "
                f"options in config.json; {checkpoint.RECOMPILE}"
            )

    def _may_have_changed(self, module: str, tensor: torch.Tensor) -> bool:
        """Whether a weight that is dense here was pruned first."""
        return self.bitnet is None and convert.is_projection(module) and tensor.dtype in convert.PRUNABLE_DTYPES

    def _same_ternary(self, module: str, expected: torch.Tensor) -> bool:
        assert self.bitnet is not None
        parts = [(n, self._read(n)) for n in (f"{module}.weight", f"{module}.weight_scale")]
        dense = dict(self.bitnet.expand(iter(parts), convert.is_projection, expected.dtype))[f"{module}.weight"]
        scales = dense.abs().max().float(), expected.abs().max().float()
        close = torch.isclose(*scales, rtol=torch.finfo(expected.dtype).eps, atol=0.0)
        return dense.shape == expected.shape and torch.equal(dense.sign(), expected.sign()) and bool(close)

    def _read(self, name: str) -> torch.Tensor:
        path = self.files[name]
        with checkpoint.open_shard(path) as shard:
            try:
                tensor: torch.Tensor = shard.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: {name} cannot be read: {error}; {checkpoint.RECOMPILE}") from None
        return tensor


def _specs(entry: checkpoint.ModuleEntry) -> tuple[TensorSpec, ...]:
    return get_format(entry.format).specs(entry.attributes)


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _forget(path: Path) -> None:
    """Have a file read from the disk again, not from memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
