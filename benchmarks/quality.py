"""Size against perplexity of the shipped language model: python benchmarks/quality.py --help.

Every projection is pruned by magnitude and packed as an engine would, then put back as what it
stands for; transformers computes the perplexity of files of Python's standard library, text of the
kind the model was trained on. Size: machine forms of all projections.
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
from pathlib import Path
from typing import Any

import machine
import pictures
import torch
from contest import console
from rich.progress import track
from rich.table import Table

import sparse_backend as sb
from sparse_backend.compiler.convert import is_projection
from sparse_backend.compiler.prune import magnitude

MODEL = Path(__file__).resolve().parents[1] / "models" / "python-lm"
FILES = ("argparse.py", "ast.py", "dataclasses.py", "inspect.py", "pathlib.py", "tarfile.py")
# (share pruned, values); None: the weights as they are.
VARIANTS: tuple[tuple[float, str | None], ...] = (
    (0.0, None), (0.0, "int8"), (0.0, "int4"), (0.3, None), (0.5, None), (0.5, "bf16x12"), (0.5, "int8"), (0.5, "int4"),
    (0.7, None), (0.7, "int8"), (0.7, "int4"),
)  # fmt: skip


def perplexity(model: Any, tokens: torch.Tensor, window: int) -> float:
    loss, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, tokens.numel() - 1, window):
            part = tokens[start : start + window + 1]
            if part.numel() < 2:
                break
            logits = model(part[None, :-1]).logits[0].float()
            loss += torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum").item()
            count += part.numel() - 1
    return math.exp(loss / count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40000, help="tokens of text to score")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.csv, .json and .png")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "\n".join((library / name).read_text() for name in FILES)
    tokens = torch.tensor(tokenizer(text).input_ids[: args.tokens])
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    originals = {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and is_projection(name)
    }
    rows: list[dict[str, Any]] = []
    for sparsity, values in track(VARIANTS, console=console):
        size = 0
        for name, weight in originals.items():
            target = model.get_submodule(name).weight.data
            if sparsity == 0 and values is None:
                target.copy_(weight)
                size += weight.nbytes
                continue
            packed = sb.pack(magnitude(weight, sparsity), format="bitmask", values=values)
            target.copy_(packed.unpack())
            size += packed.lower().nbytes
        name = "dense bf16" if not sparsity and values is None else f"{sparsity:.0%} {values or 'bf16'}"
        rows.append({"name": name, "sparsity": sparsity, "values": values or "bf16", "mb": size / 1e6,
                     "perplexity": perplexity(model, tokens, 512), "tokens": tokens.numel()})  # fmt: skip
    table = Table("", "MB of projections", "perplexity", title=f"python-lm, {tokens.numel()} tokens")
    for row in rows:
        table.add_row(row["name"], f"{row['mb']:.2f}", f"{row['perplexity']:.3f}")
    console.print(table)
    if args.save:
        machine.save_results(args.save, rows, machine.describe())
        console.print(f"wrote {pictures.of_quality(args.save, rows).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
