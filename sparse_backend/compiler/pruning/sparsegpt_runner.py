"""Run llm-compressor's SparseGPT: `python sparsegpt_runner.py JOB.json`, started by sparsegpt.py.

Imports nothing of this package: it runs in llm-compressor's environment. The job names the model, the folder to
write, and per pattern the modules with their sparsities; the tokens lie in ids.safetensors beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from safetensors.torch import load_file


def main() -> None:
    """Prune and save the model.

    Raises:
        SystemExit: the model lacks a module of the job, or its architecture is unknown.
    """
    path = Path(sys.argv[1])
    job: dict[str, Any] = json.loads(path.read_text())
    ids = load_file(path.with_name("ids.safetensors"))["ids"]
    name = json.loads((Path(job["model"]) / "config.json").read_text()).get("architectures", ["none"])[0]
    architecture = getattr(transformers, name, None)
    if architecture is None:
        sys.exit(f"transformers {transformers.__version__} knows no architecture {name!r}; use method magnitude")
    # float32: CPUs without bf16 instructions compute it ten times faster than bf16.
    model = architecture.from_pretrained(job["model"], dtype=torch.float32)
    order = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    recipe = []
    for pattern, modules in job["groups"].items():
        absent = sorted(modules.keys() - set(order))
        if absent:
            sys.exit(f"transformers' model has no linear layer {absent[0]}; add it to 'ignore', or use magnitude")
        targets = [n for n in order if n in modules]  # llm-compressor takes sparsities in the model's order
        structure = "0:0" if pattern == "unstructured" else pattern
        sparsities = [modules[n] for n in targets]
        recipe.append(SparseGPTModifier(sparsity=sparsities, mask_structure=structure, targets=targets))
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=1)
    oneshot(model=model, dataset=loader, recipe=recipe, num_calibration_samples=len(ids), pipeline="sequential")
    model.save_pretrained(job["target"], save_compressed=False)


if __name__ == "__main__":
    main()
