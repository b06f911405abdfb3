"""Perplexity of the shipped language model, by size and by pruning method: python benchmarks/quality.py --help.

transformers computes, in float32, the perplexity of files of Python's standard library, text of the kind the model
was trained on. Table `size`: every projection is pruned by magnitude and packed as an engine would, then put back as
what it stands for; sizes are those of the machine forms. Table `pruning`: every method in every pattern, calibrated on
other files of that library.
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import machine
import pictures
import torch
from contest import console
from rich.progress import track
from rich.table import Table

import sparse_backend as sb
from sparse_backend import Options
from sparse_backend.compiler import checkpoint
from sparse_backend.compiler.convert import is_projection
from sparse_backend.compiler.prune import magnitude
from sparse_backend.compiler.pruning.pruner import Pruner
from sparse_backend.compiler.pruning.text import Calibration

MODEL = Path(__file__).resolve().parents[1] / "models" / "python-lm"
FILES = ("argparse.py", "ast.py", "dataclasses.py", "inspect.py", "pathlib.py", "tarfile.py")
CALIBRATION = ("asyncio/base_events.py", "subprocess.py", "turtle.py", "typing.py", "zipfile.py")
SPARSITIES = (0.3, 0.5, 0.7)
# (method, pattern, allocation, sparsities)
PRUNINGS: tuple[tuple[str, str, str, tuple[float, ...]], ...] = (
    ("magnitude", "unstructured", "uniform", SPARSITIES),
    ("wanda", "unstructured", "uniform", SPARSITIES),
    ("sparsegpt", "unstructured", "uniform", SPARSITIES),
    ("magnitude", "unstructured", "error", SPARSITIES),
    ("wanda", "unstructured", "error", SPARSITIES),
    ("magnitude", "2:4", "uniform", (0.5,)),
    ("wanda", "2:4", "uniform", (0.5,)),
    ("sparsegpt", "2:4", "uniform", (0.5,)),
    ("magnitude", "block:16x16", "uniform", (0.5,)),
    ("wanda", "block:16x16", "uniform", (0.5,)),
)
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


class Shipped:
    """The shipped model, its projections as they are, and the text to score."""

    def __init__(self, tokens: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        text = "\n".join(_library(name) for name in FILES)
        self.tokens = torch.tensor(AutoTokenizer.from_pretrained(MODEL)(text).input_ids[:tokens])
        self.model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        self.weights = {
            name: module.weight.detach().bfloat16()  # what the checkpoint holds
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and is_projection(name)
        }

    def perplexity(self, weights: dict[str, torch.Tensor]) -> float:
        for name, weight in weights.items():
            self.model.get_submodule(name).weight.data.copy_(weight)
        return perplexity(self.model, self.tokens, 512)


def _library(name: str) -> str:
    return (Path(sysconfig.get_paths()["stdlib"]) / name).read_text()


def by_size(shipped: Shipped) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for sparsity, values in track(VARIANTS, console=console):
        size, weights = 0, {}
        for name, weight in shipped.weights.items():
            if sparsity == 0 and values is None:
                weights[name] = weight
                size += weight.nbytes
                continue
            packed = sb.pack(magnitude(weight, sparsity), format="bitmask", values=values)
            weights[name] = packed.unpack()
            size += packed.lower().nbytes
        name = "dense bf16" if not sparsity and values is None else f"{sparsity:.0%} {values or 'bf16'}"
        rows.append({"name": name, "sparsity": sparsity, "values": values or "bf16", "mb": size / 1e6,
                     "perplexity": shipped.perplexity(weights), "tokens": shipped.tokens.numel()})  # fmt: skip
    table = Table("", "MB of projections", "perplexity", title=f"python-lm, {shipped.tokens.numel()} tokens")
    for row in rows:
        table.add_row(row["name"], f"{row['mb']:.2f}", f"{row['perplexity']:.3f}")
    console.print(table)
    return rows


def by_pruning(shipped: Shipped) -> list[dict[str, Any]]:
    info = checkpoint.read(MODEL)
    about = {"tokens": shipped.tokens.numel()}
    rows: list[dict[str, Any]] = [
        {"method": "dense", "pattern": "", "allocation": "", "sparsity": 0.0, "zeros": 0.0,
         "perplexity": shipped.perplexity(shipped.weights), **about}
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "calibration.txt"
        text.write_text("\n".join(_library(name) for name in CALIBRATION))
        for method, pattern, allocation, sparsities in PRUNINGS:
            for sparsity in sparsities:
                options = Options(sparsity=sparsity, method=method, pattern=pattern, allocation=allocation)
                pruner = Pruner(info, options, None if method == "magnitude" else Calibration(text))
                with console.status(f"{method} {pattern} {sparsity:.0%}, allocation {allocation}"):
                    pruner.prepare()
                    weights = {n: pruner.prune(n, w, options) for n, w in shipped.weights.items()}
                    pruner.close()
                    zeros = sum(int((w == 0).sum()) for w in weights.values())
                    zeros /= sum(w.numel() for w in weights.values())
                    rows.append({"method": method, "pattern": pattern, "allocation": allocation, "sparsity": sparsity,
                                 "zeros": zeros, "perplexity": shipped.perplexity(weights), **about})  # fmt: skip
                console.print(f"{method} {pattern} {allocation} {zeros:.2%}: {rows[-1]['perplexity']:.3f}")
    title = f"python-lm, {shipped.tokens.numel()} tokens, dense {rows[0]['perplexity']:.3f}"
    table = Table("method", "pattern", "allocation", *(f"{s:.0%}" for s in SPARSITIES), title=title)
    for method, pattern, allocation, _ in PRUNINGS:
        found = {
            r["sparsity"]: r["perplexity"]
            for r in rows
            if (r["method"], r["pattern"], r["allocation"]) == (method, pattern, allocation)
        }
        cells = (f"{found[s]:.2f}" if s in found else "" for s in SPARSITIES)
        table.add_row(method, pattern, allocation, *cells)
    console.print(table)
    return rows


TABLES = {"size": (by_size, pictures.of_quality), "pruning": (by_pruning, pictures.of_pruning)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40000, help="tokens of text to score")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="which tables to make")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.csv, .json and .png, NAME-pruning likewise")
    args = parser.parse_args()
    shipped = Shipped(args.tokens)
    for table in args.tables:
        make, picture = TABLES[table]
        rows = make(shipped)
        if args.save:
            name = args.save if table == "size" else f"{args.save}-{table}"
            machine.save_results(name, rows, machine.describe())
            console.print(f"wrote {picture(name, rows).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
