"""`sparse-backend compile`: a checkpoint in, a compiled (or Hugging Face bitnet) one out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .. import __version__
from ..errors import CheckpointError, OptionError, SparseBackendError, WeightError
from ..formats.ternary import Ternary
from ..options import QUANT_METHOD, Options
from ..packed import PackedWeight
from ..report import Report, human_bytes
from . import bitnet, card, checkpoint, convert, resume, writer
from .pruning import elsewhere
from .pruning.pruner import Pruner
from .pruning.text import Calibration
from .source import Progress, Source, unfitting, why_unknown
from .verify import Change, verify_checkpoint
from .work import Say, WorkFolder, folder_of

LAYOUTS = (QUANT_METHOD, bitnet.METHOD)

_log: Say = logging.getLogger(__name__).warning


def compile_checkpoint(
    source: str | Path,
    target: str | Path,
    options: Options,
    progress: Progress | None = None,
    max_shard_bytes: int = writer.MAX_SHARD_BYTES,
    layout: str = QUANT_METHOD,
    verify: bool = False,
    say: Say = _log,
    command: str | None = None,
    calibration: Calibration | None = None,
) -> Report:
    """Write a compiled copy of a checkpoint.

    Reads one tensor at a time and holds at most one output shard. The result appears under its name only when it is
    whole; the source is only read. A run that is killed, interrupted or out of disk leaves the shards it finished in
    `.NAME.incomplete` beside the target; the same call goes on from there, to the same bytes.

    Args:
        source: folder in HF layout with safetensors shards: plain, or BitNet in any of its forms;
            for layout `bitnet` also a compiled one.
        target: folder to create.
        options: what to do; written to config.json.
        progress: called as (bytes done, bytes in all, what is being done).
        max_shard_bytes: size at which an output shard is closed.
        layout: `sparse-compiled`, or `bitnet` for Hugging Face's packing of ternary weights.
        verify: read the result back and compare every tensor with the source (compiler/verify.py) before it
            gets its name.
        say: told, in one line each, of a run taken up or thrown away, an unknown architecture, and patterns of
            `options` that fit no module.
        command: what the model card says made the result; None for this call.
        calibration: text for the methods that calibrate, wanda and sparsegpt.

    Returns:
        What became of every projection.

    Raises:
        CheckpointError: the source cannot be read, the target exists, is being written by another run or cannot
            be written, or the result is not the source (nothing is left of it).
        WeightError: a weight holds NaN or Inf, or `layout` cannot hold it.
        OptionError: nothing would be packed.
    """
    source, target = Path(source), Path(target)
    job = _Job(source, options, layout, say, calibration)
    if target.exists():
        raise CheckpointError(f"{target}: exists already; remove it or choose another name")
    made_by = command or f"compile_checkpoint({str(source)!r}, {str(target)!r}, {job.options}, layout={layout!r})"
    if command is None and calibration is not None:
        made_by = f"{made_by[:-1]}, calibration={calibration})"
    work = None
    try:
        key, profile = job.key(max_shard_bytes), None
        if job.plans:
            profile = resume.profile_for(folder_of(target), key)
            key[resume.MACHINE] = resume.digest(profile)
        work = WorkFolder(target, key, say)
        output = writer.Writer(work, max_shard_bytes)
        try:
            with resume.planning_by(profile, work.folder):
                job.run(output, progress)
            text = card.write(job.source.info, job.options, layout, output.report, made_by, target.name)
            output.finish({**job.source.info.config, "quantization_config": job.quantization_config()}, text, source)
            if verify:
                verify_checkpoint(source, work.model, progress, job.change)
        except SparseBackendError:
            work.discard()
            work.shards.clear()
            raise
        work.publish()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_cannot_write(target, error, job, work)) from None
    finally:
        job.close()
        if work is not None:
            work.close()
    return output.report


def plan_checkpoint(
    source: str | Path,
    options: Options,
    progress: Progress | None = None,
    layout: str = QUANT_METHOD,
    say: Say = _log,
    calibration: Calibration | None = None,
) -> Report:
    """What `compile_checkpoint` would do, exactly: every weight is changed and packed, and nothing is written.

    Args, Raises: as compile_checkpoint.
    """
    job = _Job(Path(source), options, layout, say, calibration)
    output = writer.Writer(None)
    try:
        job.run(output, progress)
    finally:
        job.close()
    return output.report


def _cannot_write(target: Path, error: Exception, job: _Job, work: WorkFolder | None) -> str:
    text = f"{target}: cannot be written: {error}"
    if work is None or job.output is None:
        return text
    folder = next(p for p in (target.absolute(), *target.absolute().parents) if p.is_dir())
    left = job.output.bytes + job.source.total_bytes - job.source.done_bytes
    text += f"; up to {human_bytes(left)} more are needed, {human_bytes(shutil.disk_usage(folder).free)} are free there"
    if not work.shards:
        return f"{text}; nothing was left behind"
    return f"{text}; the {len(work.shards)} shards in {work.folder} are kept, the same command goes on from them"


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
    """One checkpoint on its way.

    Attributes:
        options: as asked, with what the checkpoint itself says filled in.
        change: makes of a weight what the options ask for.
        output: of the run; None before it.
    """

    def __init__(
        self, folder: Path, options: Options, layout: str, say: Say, calibration: Calibration | None = None
    ) -> None:
        if layout not in LAYOUTS:
            raise OptionError(f"layout {layout!r} is unknown; allowed: {', '.join(LAYOUTS)}")
        info = checkpoint.read(folder)
        self.source, self.layout, self.say = Source(info), layout, say
        self.output: writer.Writer | None = None
        self.bitnet = self.source.bitnet
        quantization = info.config.get("quantization_config")
        if info.modules and layout == bitnet.METHOD:
            if options != Options() or calibration is not None:
                raise OptionError(f"{info.folder}: is compiled; only its layout can change now, drop the other options")
            options = dataclasses.replace(Options.from_dict(dict(quantization or {})), bits=None)
        elif (
            quantization is not None
            and self.bitnet is None
            and not elsewhere.is_only_pruned(quantization, info.folder, info.tensors)
        ):
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
        reason = why_unknown(info.config)
        if reason is not None:
            say(f"{info.folder}: unknown architecture ({reason}); converted by tensor names and shapes, check the plan")
        for warning in unfitting(info, options) if not info.modules else ():
            say(warning)

        # What a compiled checkpoint's options say was pruned, was: its weights come as they are.
        self.pruner = None if info.modules else Pruner(info, options, calibration, plain=self.bitnet is None)
        pruned = (lambda module, weight, options: weight) if self.pruner is None else self.pruner.prune
        self.change: Change = functools.partial(convert.change_weight, pruned=pruned)

    def key(self, max_shard_bytes: int) -> dict[str, Any]:
        """What decides every byte of the result, but for the profile where formats are chosen by one."""
        info = self.source.info
        files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in info.files]
        source = json.dumps([str(info.folder.absolute()), files, info.config, sorted(info.tensors.items())])
        return {
            "package version": __version__,
            "options": self.options.to_dict(),
            "layout": self.layout,
            "shard size": max_shard_bytes,
            "calibration": None if self.pruner is None else self.pruner.digest(),
            "processor": resume.machine_key() if self.plans else None,
            "source": hashlib.sha256(source.encode()).hexdigest(),
        }

    @property
    def plans(self) -> bool:
        """Whether formats are chosen, and not named."""
        return self.options.format == "auto" or any(r.get("format") == "auto" for r in self.options.rules)

    def run(self, output: writer.Writer, progress: Progress | None) -> None:
        """Convert tensor by tensor.

        Raises:
            OptionError: nothing was packed.
        """
        self.output = output
        if self.pruner is not None:
            self._prepare(self.pruner, output.work.folder if output.work is not None else None, progress)
        finished = output.work.results() if output.work is not None else set()
        for name, tensor in self.source.weights(finished):
            if progress is not None:
                progress(self.source.done_bytes, self.source.total_bytes, name)
            self._convert(name, tensor, output)
            output.done(name)
        output.flush()
        report = output.report
        report.total_bytes = output.total_bytes
        if not report.packed_count:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in report.dense_reasons().items())
            raise OptionError(
                f"{self.source.info.folder}: nothing to pack ({reasons or 'no projection'}); {self._advice(report)}"
            )

    def _advice(self, report: Report) -> str:
        """What to change where nothing was packed."""
        left = [line.module for line in report.lines if convert.is_projection(line.module)]
        chosen = [o for o in map(self.options.for_module, left) if o is not None and o.format != "dense"]
        if not chosen:
            if self.options.format == "dense":
                return "format dense packs nothing; name another"
            return "the patterns of 'ignore' and 'rules' leave no projection; change those"
        if any(o.target_sparsity for o in chosen):
            return "pass a higher --sparsity, or name a --format"
        return "pass --sparsity to prune"

    def _prepare(self, pruner: Pruner, folder: Path | None, progress: Progress | None) -> None:
        total = self.source.total_bytes

        def share(done: float, what: str) -> None:
            if progress is not None:
                progress(int(done * total), total, what)

        pruner.prepare(folder, share)
        for note in pruner.notes:
            self.say(note)

    def close(self) -> None:
        """Remove what pruning wrote beside the result."""
        if self.pruner is not None:
            self.pruner.close()

    def _convert(self, name: str, tensor: torch.Tensor, output: writer.Writer) -> None:
        module = name.removesuffix(".weight")
        if module == name or tensor.dim() != 2:
            return output.add(name, tensor)
        options = self.options.for_module(module)
        reason = convert.why_not_projection(module)
        if reason is None and options is None:
            reason = convert.IGNORED
        if reason is None and tensor.dtype not in convert.PRUNABLE_DTYPES:
            reason = f"{str(tensor.dtype).removeprefix('torch.')} weights are left as they are"
        packed = None
        if reason is None and options is not None:
            tensor, what = self.change(module, tensor, options)
            packed, reason = convert.pack_weight(module, tensor, options)
            if packed is not None:
                packed = self._exact(module, packed)
                output.report.note(convert.what_changed(tensor, packed, what))
                if self._rounds_activations(packed):
                    output.report.note("given int8 activations")
            elif what is not None and what.startswith("pruned"):
                output.report.note("pruned")  # values round only as they pack
        if packed is None:
            output.add(name, tensor)
            output.report.add_dense(module, tensor.nbytes, reason or "")
        else:
            self._write(module, packed, output)
            output.report.add_packed(module, packed.format, tensor.nbytes, packed.nbytes)

    def _rounds_activations(self, packed: PackedWeight) -> bool:
        """Whether its activations are rounded here and were not in the source."""
        trained = self.bitnet is not None or bool(self.source.info.modules)
        return not trained and packed.attributes.get("activations") == "int8"

    def _exact(self, module: str, packed: PackedWeight) -> PackedWeight:
        """The packed weight under its checkpoint's own scale, where the dense dtype rounded it."""
        if self.bitnet is None or module not in self.bitnet.scales or packed.format != "ternary":
            return packed
        return Ternary().rescale(packed, torch.tensor([[self.bitnet.scales[module]]], dtype=torch.float32))

    def _write(self, module: str, packed: PackedWeight, output: writer.Writer) -> None:
        if self.layout != bitnet.METHOD:
            return output.add_packed(module, packed)
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
        output.add(f"{module}.weight", bitnet.pack_codes(module, Ternary().codes(packed)))
        output.add(f"{module}.weight_scale", scale.to(convert.model_dtype(self.source.info.config)))

    def _linear_class(self) -> str:
        """`bitlinear` where a scale is exact only as an inverse, or a bias must not be scaled with the weight."""
        info = self.source.info
        dtype = str(convert.model_dtype(info.config)).removeprefix("torch.")
        inverse = any(e.format == "ternary" and e.dtype != dtype for e in info.modules.values())
        if self.bitnet is not None:
            inverse = self.bitnet.linear_class == "bitlinear"
        bias = any(
            name.endswith(".bias") and convert.is_projection(name.removesuffix(".bias")) for name in info.tensors
        )
        return "bitlinear" if inverse or bias else "autobitlinear"

    def quantization_config(self) -> dict[str, Any]:
        """For the target's config.json."""
        if self.layout != bitnet.METHOD or self.output is None:
            return self.options.to_dict()
        dense = [line.module for line in self.output.report.lines if line.format == "dense"]
        return {
            "quant_method": bitnet.METHOD,
            "linear_class": self._linear_class(),
            "quantization_mode": "offline",
            "modules_to_not_convert": sorted({*dense, "lm_head"}),
        }
