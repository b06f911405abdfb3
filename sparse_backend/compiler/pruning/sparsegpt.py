"""SparseGPT (Frantar & Alistarh, 2023) by llm-compressor, in the Python that has it.

llm-compressor pins a version of compressed-tensors that vLLM does not take, so it lives in an environment of its own
(`make env-prune`) and runs there as a process: `sparsegpt_runner.py` writes a checkpoint with the pruned weights.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from ... import envs
from ...errors import CheckpointError, OptionError, WeightError
from ...options import NM_PATTERNS, Options
from .. import checkpoint

RUNNER = Path(__file__).with_name("sparsegpt_runner.py")
# llm-compressor thresholds blocks of 128 columns over all rows; a weight's sparsity is as near as that allows.
_NEAR = 0.01
_LINES = 12


def interpreter() -> str:
    """The Python that has llm-compressor.

    Raises:
        OptionError: there is none.
    """
    python = envs.prune_python()
    if python is not None:
        if not Path(python).is_file():
            raise OptionError(f"{envs.PRUNE_PYTHON_VARIABLE}={python}: no such file; give the path of a Python")
        return python
    if importlib.util.find_spec("llmcompressor") is not None:
        return sys.executable
    raise OptionError(
        "method sparsegpt runs llm-compressor, which this environment lacks. It pins versions that vLLM does not take, "
        "so install it in one of its own (`make env-prune`, or `pip install 'llmcompressor==0.14.0.1'` in a new one) "
        f"and set {envs.PRUNE_PYTHON_VARIABLE} to that environment's Python"
    )


class Pruned:
    """The checkpoint that llm-compressor wrote; weights are read one at a time."""

    def __init__(self, folder: Path) -> None:
        info = checkpoint.read(folder)
        self._files: dict[str, Path] = {}
        for path in info.files:
            with checkpoint.open_shard(path) as shard:
                self._files.update(dict.fromkeys(shard.keys(), path))

    def weight(self, module: str, original: torch.Tensor, sparsity: float) -> torch.Tensor:
        """The pruned weight of a module.

        Raises:
            WeightError: it is not there, or not pruned.
        """
        name = f"{module}.weight"
        if name not in self._files:
            raise WeightError("llm-compressor's model has no weight of this name; leave it to method magnitude")
        with checkpoint.open_shard(self._files[name]) as shard:
            weight: torch.Tensor = shard.get_tensor(name)
        if weight.shape != original.shape:
            raise WeightError(f"llm-compressor made its shape {list(weight.shape)}, not {list(original.shape)}")
        if not torch.isfinite(weight).all():
            raise WeightError("llm-compressor left NaN or infinite values; calibrate on more text")
        zeros = float((weight == 0).float().mean())
        if zeros < sparsity - _NEAR:
            raise WeightError(f"llm-compressor pruned {zeros:.1%} of it, not {sparsity:.1%}; calibrate on more text")
        return weight.to(original.dtype)


def run(
    model: Path, target: Path, targets: Mapping[str, Options], shapes: Mapping[str, tuple[int, ...]], ids: torch.Tensor
) -> Pruned:
    """Prune a checkpoint with SparseGPT; takes minutes, and the whole model in memory.

    Args:
        model: source checkpoint.
        target: folder to write the pruned checkpoint to; what is there is overwritten.
        targets: the modules to prune and their options.
        shapes: their weights' shapes.
        ids: calibration tokens, int64 [count, length].

    Raises:
        OptionError: llm-compressor is nowhere, or a weight's columns are no multiple of M.
        CheckpointError: llm-compressor failed, with the end of what it said.
    """
    python = interpreter()
    groups: dict[str, dict[str, float]] = {}
    for module, options in targets.items():
        _, m = NM_PATTERNS.get(options.pattern, (1, 1))
        if shapes[module][1] % m:
            raise OptionError(
                f"{module}: method sparsegpt with pattern {options.pattern} needs a multiple of {m} columns, it has "
                f"{shapes[module][1]}; add a rule with method wanda for it"
            )
        groups.setdefault(options.pattern, {})[module] = options.target_sparsity
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        save_file({"ids": ids}, Path(folder) / "ids.safetensors")
        description = {"model": str(model.absolute()), "target": str(target.absolute()), "groups": groups}
        job.write_text(json.dumps(description))
        # Its own folder: llm-compressor leaves logs where it stands, and must not import what stands here.
        result = subprocess.run(
            [python, str(RUNNER.absolute()), str(job)], cwd=folder, text=True, capture_output=True, check=False
        )
    if result.returncode != 0:
        said = "\n".join((result.stderr or result.stdout).strip().splitlines()[-_LINES:])
        raise CheckpointError(f"{model}: llm-compressor ({python}) failed with exit code {result.returncode}:\n{said}")
    return Pruned(target)
