"""`sparse-backend compile`: a checkpoint in, a compiled (or Hugging Face bitnet) one out."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import CheckpointError, OptionError, WeightError
from ..formats.ternary import Ternary
from ..options import QUANT_METHOD, Options
from ..packed import PackedWeight
from ..report import Report
from . import bitnet, checkpoint, convert

LAYOUTS = (QUANT_METHOD, bitnet.METHOD)
Progress = Callable[[int, int, str], None]


def compile_checkpoint(
    source: str | Path,
    target: str | Path,
    options: Options,
    progress: Progress | None = None,
    max_shard_bytes: int = convert.MAX_SHARD_BYTES,
    layout: str = QUANT_METHOD,
) -> Report:
    """Write a compiled copy of a checkpoint.

    Reads one tensor at a time and holds at most one output shard. The result appears under
    its name only when it is whole; the source is only read.

    Args:
        source: folder in HF layout with safetensors shards: plain, or BitNet in any of its forms;
            for layout `bitnet` also a compiled one.
        target: folder to create.
        options: what to do; written to config.json.
        progress: called as (bytes done, bytes in all, tensor name).
        max_shard_bytes: size at which an output shard is closed.
        layout: `sparse-compiled`, or `bitnet` for Hugging Face's packing of ternary weights.

    Returns:
        What became of every projection.

    Raises:
        CheckpointError: the source cannot be read, the target exists or cannot be written.
        WeightError: a weight holds NaN or Inf, or `layout` cannot hold it.
        OptionError: nothing would be packed.
    """
    if layout not in LAYOUTS:
        raise OptionError(f"layout {layout!r} is unknown; allowed: {', '.join(LAYOUTS)}")
    source, target = Path(source), Path(target)
    job = _Job(checkpoint.read(source), options, layout)
    if target.exists():
        raise CheckpointError(f"{target}: exists already; remove it or choose another name")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.incomplete-", dir=target.parent))
        work.chmod(0o755)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error}") from None
    try:
        writer = convert.Writer(work)
        report = job.run(writer, progress, max_shard_bytes)
        convert.copy_other_files(source, work)
        convert.write_json(work / "config.json", {**job.info.config, "quantization_config": job.quantization_config()})
        work.rename(target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: cannot be written: {error}; nothing was left behind") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def _check_bitnet_can_say(options: Options) -> None:
    """OptionError for what a checkpoint in Hugging Face's bitnet layout has no word for."""
    if options.activations != "int8":
        raise OptionError(
            "layout bitnet means int8 activations to whoever reads it; say --activations int8 if this model was "
            "trained for them"
        )
    for key in ("bits", "lm_head"):
        if getattr(options, key) != getattr(Options(), key):
            raise OptionError(f"option '{key}' cannot be stored in layout bitnet; drop it")


class _Job:
    """One checkpoint on its way."""

    def __init__(self, info: checkpoint.Checkpoint, options: Options, layout: str) -> None:
        self.info, self.layout = info, layout
        self.report = Report()
        self.bitnet = bitnet.BitNet.of(info.config, info.tensors)
        quantization = info.config.get("quantization_config")
        if info.modules and layout == bitnet.METHOD:
            if options != Options():
                raise OptionError(f"{info.folder}: is compiled; only its layout can change now, drop the other options")
            options = dataclasses.replace(Options.from_dict(dict(quantization or {})), bits=None)
        elif quantization is not None and self.bitnet is None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise CheckpointError(f"{info.folder}: is already quantised ({method}); compile the original checkpoint")
        if self.bitnet is not None and self.bitnet.rms_norm_eps is not None:
            raise CheckpointError(
                f"{info.folder}: its layers normalise their inputs (use_rms_norm), which a compiled checkpoint "
                "cannot say; serve it as it is, it is converted while loading"
            )
        if self.bitnet is not None and options.activations is None:
            options = dataclasses.replace(options, activations="int8")
        if layout == bitnet.METHOD:
            _check_bitnet_can_say(options)
        self.options = options
        if (
            not any(
                n.endswith(".weight") and convert.is_projection(n.removesuffix(".weight")) and len(shape) == 2
                for n, (_, shape) in info.tensors.items()
            )
            and not info.modules
        ):
            raise CheckpointError(
                f"{info.folder}: has no linear projection to convert (no 2-D '<module>.weight' tensor)"
            )

    def run(self, writer: convert.Writer, progress: Progress | None, max_shard_bytes: int) -> Report:
        """Convert tensor by tensor.

        Raises:
            OptionError: nothing was packed.
        """
        total = sum(path.stat().st_size for path in self.info.files)
        done = 0

        def stored() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal done
            for path in self.info.files:
                with checkpoint.open_shard(path) as shard:
                    for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                        tensor = shard.get_tensor(name)
                        done += tensor.nbytes
                        yield name, tensor

        weights = checkpoint.expand(stored(), self.info.modules)
        if self.bitnet is not None:
            weights = self.bitnet.expand(weights, convert.is_projection, convert.model_dtype(self.info.config))
        for name, tensor in weights:
            self._convert(name, tensor, writer)
            writer.flush(max_shard_bytes)
            if progress is not None:
                progress(done, total, name)
        if not self.report.packed_count:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in self.report.dense_reasons().items())
            raise OptionError(
                f"{self.info.folder}: nothing to pack ({reasons or 'no projection'}); pass --sparsity to prune"
            )
        writer.finish()
        return self.report

    def _convert(self, name: str, tensor: torch.Tensor, writer: convert.Writer) -> None:
        module = name.removesuffix(".weight")
        if module == name or tensor.dim() != 2:
            return writer.add(name, tensor)
        options = self.options.for_module(module)
        reason = convert.why_not_projection(module)
        if reason is None and options is None:
            reason = convert.IGNORED
        if reason is None and tensor.dtype not in convert.PRUNABLE_DTYPES:
            reason = f"{str(tensor.dtype).removeprefix('torch.')} weights are left as they are"
        packed = None
        if reason is None and options is not None:
            tensor, what = convert.change_weight(module, tensor, options)
            packed, reason = convert.pack_weight(module, tensor, options)
            if packed is not None:
                packed = self._exact(module, packed)
                self.report.note("rounded" if packed.format == "int8" else what)
        if packed is None:
            writer.add(name, tensor)
            self.report.add_dense(module, tensor.nbytes, reason or "")
        else:
            self._write(module, packed, writer)
            self.report.add_packed(module, packed.format, tensor.nbytes, packed.nbytes)

    def _exact(self, module: str, packed: PackedWeight) -> PackedWeight:
        """The packed weight under its checkpoint's own scale, where the dense dtype rounded it."""
        if self.bitnet is None or module not in self.bitnet.scales or packed.format != "ternary":
            return packed
        return Ternary().rescale(packed, torch.tensor([[self.bitnet.scales[module]]], dtype=torch.float32))

    def _write(self, module: str, packed: PackedWeight, writer: convert.Writer) -> None:
        if self.layout != bitnet.METHOD:
            return writer.add_packed(module, packed)
        scales = packed.tensors["scales"] if packed.format == "ternary" else None
        if scales is None or scales.numel() != 1:
            raise WeightError(
                f"{module}: the bitnet layout holds ternary weights with one scale; this one is {packed.format} "
                f"with {0 if scales is None else scales.numel()} scales"
            )
        scale = scales.view(1).float()
        scale = torch.where(scale == 0, 1.0, scale)  # of a weight that is all zeros
        if self._linear_class() == "bitlinear":
            scale = 1.0 / scale
        writer.add(f"{module}.weight", bitnet.pack_codes(module, Ternary().codes(packed)))
        writer.add(f"{module}.weight_scale", scale.to(convert.model_dtype(self.info.config)))

    def _linear_class(self) -> str:
        """`bitlinear` where a scale is exact only as an inverse, or a bias must not be scaled with the weight."""
        dtype = str(convert.model_dtype(self.info.config)).removeprefix("torch.")
        inverse = any(e.format == "ternary" and e.dtype != dtype for e in self.info.modules.values())
        if self.bitnet is not None:
            inverse = self.bitnet.linear_class == "bitlinear"
        bias = any(
            name.endswith(".bias") and convert.is_projection(name.removesuffix(".bias")) for name in self.info.tensors
        )
        return "bitlinear" if inverse or bias else "autobitlinear"

    def quantization_config(self) -> dict[str, Any]:
        """For the target's config.json."""
        if self.layout != bitnet.METHOD:
            return self.options.to_dict()
        dense = [line.module for line in self.report.lines if line.format == "dense"]
        return {
            "quant_method": bitnet.METHOD,
            "linear_class": self._linear_class(),
            "quantization_mode": "offline",
            "modules_to_not_convert": sorted({*dense, "lm_head"}),
        }
