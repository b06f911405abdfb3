"""What compiling asks about every projection: its pruned weight, by its options' method, pattern and allocation."""

from __future__ import annotations

import collections
import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ...errors import CheckpointError, OptionError, WeightError
from ...options import Options
from .. import checkpoint, convert, prune
from . import activations, allocation, sparsegpt
from .text import SEQUENCE, Calibration

Progress = Callable[[float, str], None]
_PRUNABLE = ("BF16", "F16", "F32")
_CALIBRATED = ("wanda", "sparsegpt")


class Pruner:
    """Prunes the projections of one checkpoint.

    Attributes:
        targets: the modules to prune and their options.
        notes: what there is to say about how it was done.

    Raises:
        OptionError: calibration text is missing or of no use, or a method would prune nothing.
    """

    def __init__(
        self, info: checkpoint.Checkpoint, options: Options, calibration: Calibration | None = None, plain: bool = True
    ) -> None:
        """Check what can be checked before anything is computed.

        Args:
            info: the source checkpoint.
            options: of the whole model.
            calibration: text for the methods that calibrate.
            plain: whether the source's tensors are the weights, neither ternary codes nor compiled.
        """
        self.info, self.calibration = info, calibration
        self.targets: dict[str, Options] = {}
        for name, (dtype, shape) in info.tensors.items():
            module = name.removesuffix(".weight")
            if module == name or len(shape) != 2 or dtype not in _PRUNABLE or not convert.is_projection(module):
                continue
            own = options.for_module(module)
            if own is not None and own.target_sparsity > 0:
                self.targets[module] = own
        self.notes: list[str] = []
        self._sparsity: dict[str, float] = {}
        self._norms: dict[str, torch.Tensor] = {}
        self._pruned: sparsegpt.Pruned | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._check(options, plain)

    def _check(self, options: Options, plain: bool) -> None:
        methods = {own.method for own in self.targets.values()}
        asked = [options.to_dict(), *options.rules]
        for key, value in (("method", "wanda"), ("method", "sparsegpt"), ("allocation", "error")):
            used = any(getattr(own, key) == value for own in self.targets.values())
            if not used and any(one.get(key) == value for one in asked):
                raise OptionError(f"option '{key}' = {value!r}, but there is nothing to prune; pass --sparsity")
        calibrated = sorted(methods & set(_CALIBRATED))
        if calibrated and self.calibration is None:
            raise OptionError(
                f"method {calibrated[0]} calibrates on text; pass --calibration FILE, a plain text file of the kind "
                "the model will be used for"
            )
        if self.calibration is not None and not calibrated:
            raise OptionError("calibration text is for methods wanda and sparsegpt; pass --method wanda, or drop it")
        if not plain and (calibrated or any(own.allocation == "error" for own in self.targets.values())):
            raise OptionError(
                f"{self.info.folder}: only method magnitude with allocation uniform prunes BitNet or compiled "
                "checkpoints; prune the original one"
            )

    def digest(self) -> str | None:
        """Of the calibration text and how much of it is used; None without."""
        if self.calibration is None:
            return None
        text = self.calibration.read()
        return hashlib.sha256(f"{self.calibration.tokens} {text}".encode()).hexdigest()

    def prepare(self, folder: Path | None = None, progress: Progress = lambda share, what: None) -> None:
        """Calibrate and allocate: everything that needs more than one weight.

        Args:
            folder: where SparseGPT's output goes until `close`; None for the system's temporary files.
            progress: called as (share done, what).

        Raises:
            OptionError: the text is too short or no text, the architecture is unknown, llm-compressor is missing.
            CheckpointError: transformers or llm-compressor cannot run this model.
            WeightError: a weight holds NaN or Inf, naming the module.
        """
        by_method: dict[str, dict[str, Options]] = collections.defaultdict(dict)
        for module, own in self.targets.items():
            by_method[own.method][module] = own
        tokens = None
        if self.calibration is not None:
            limit = self.info.config.get("max_position_embeddings") or SEQUENCE
            tokens = self.calibration.sequences(self.info.folder, min(SEQUENCE, limit))
        if by_method["sparsegpt"] and tokens is not None:
            progress(0.0, "llm-compressor is pruning")
            self._scratch = tempfile.TemporaryDirectory(prefix="sparsegpt-", dir=folder)
            shapes = {module: self.info.tensors[f"{module}.weight"][1] for module in by_method["sparsegpt"]}
            self._pruned = sparsegpt.run(
                self.info.folder, Path(self._scratch.name), by_method["sparsegpt"], shapes, tokens
            )
        if not by_method["wanda"]:
            self._allocate(progress)
        elif tokens is not None:
            self._calibrate(tokens, by_method["wanda"], progress)

    def _calibrate(self, tokens: torch.Tensor, targets: dict[str, Options], progress: Progress) -> None:
        model = activations.load_model(self.info.folder, self.info.config)
        if any(own.allocation == "error" for own in targets.values()):
            self._norms = activations.input_norms(model, tokens, None, progress).of
            self._reached(targets)
        self._allocate(progress)

        def pruned(module: str, weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
            self._norms[module] = norms
            try:
                return self.prune(module, weight, self.targets[module]) if module in self.targets else weight
            except WeightError as error:
                raise WeightError(f"{module}: {error}; {convert.FIX}") from None

        found = activations.input_norms(model, tokens, pruned, progress)
        self._norms = found.of
        if found.dense_because is not None:
            self.notes.append(
                "wanda measured activations on the dense model, not block by block behind pruned blocks: "
                f"{found.dense_because}"
            )
        self._reached(targets)

    def _reached(self, targets: dict[str, Options]) -> None:
        missed = sorted(targets.keys() - self._norms.keys())
        if missed:
            raise CheckpointError(
                f"{missed[0]} (and {len(missed) - 1} more): the calibration text reaches no linear layer of this name "
                "in transformers' model; add it to 'ignore', or a rule with method magnitude"
            )

    def _allocate(self, progress: Progress) -> None:
        """Fill in the sparsities of modules with allocation `error`; those of equal options share one budget."""
        groups: dict[tuple[str, str, float], list[str]] = collections.defaultdict(list)
        for module, own in self.targets.items():
            if own.allocation == "error":
                groups[own.method, own.pattern, own.target_sparsity].append(module)
        names, curves = {m for group in groups.values() for m in group}, {}
        for path in self.info.files:
            with checkpoint.open_shard(path) as shard:
                for module in [k.removesuffix(".weight") for k in shard.keys()]:  # noqa: SIM118 - no mapping
                    if module not in names:
                        continue
                    own = self.targets[module]
                    norms = self._norms[module] if own.method == "wanda" else None
                    try:
                        curves[module] = prune.error_curve(shard.get_tensor(f"{module}.weight"), norms, own.pattern)
                    except WeightError as error:
                        raise WeightError(f"{module}: {error}; {convert.FIX}") from None
                    progress(len(curves) / len(names), "measuring the error of pruning")
        for (_, _, target), modules in groups.items():
            sizes = {
                m: self.info.tensors[f"{m}.weight"][1][0] * self.info.tensors[f"{m}.weight"][1][1] for m in modules
            }
            shares = allocation.equal_error({m: curves[m] for m in modules}, sizes, target)
            self._sparsity.update(shares)
            self.notes.append(
                f"allocation error: {len(modules)} projections pruned by {min(shares.values()):.1%} to "
                f"{max(shares.values()):.1%}, {target:.1%} of their weights"
            )

    def sparsity(self, module: str) -> float:
        """The share of a module's weights that is pruned; 0.0 if it is none of the targets."""
        if module not in self.targets:
            return 0.0
        return self._sparsity.get(module, self.targets[module].target_sparsity)

    def prune(self, module: str, weight: torch.Tensor, options: Options) -> torch.Tensor:
        """The pruned weight [N, K] of a module.

        Raises:
            WeightError: the weight holds NaN or Inf.
        """
        share = self._sparsity.get(module, options.target_sparsity)
        if options.method == "wanda":
            return prune.wanda(weight, self._norms[module], share, options.pattern)
        if options.method == "sparsegpt" and self._pruned is not None:
            return self._pruned.weight(module, weight, share)
        return prune.METHODS[options.method](weight, share, options.pattern)

    def close(self) -> None:
        """Remove what `prepare` wrote."""
        if self._scratch is not None:
            self._scratch.cleanup()
