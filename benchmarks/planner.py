"""Is the plan right? Predicted against measured time of every format, and what its choices cost.

For each shape, share of zeros and batch, every format the plan considers for such a weight, dense among them,
takes turns (contest.py), and so do a read of plain memory and a small product from the cache: predictions are also
made for the bandwidth and the instruction speed of that moment, which on a shared machine are not those of the
calibration. Fails if one of these, of what was chosen or came second, is more than 25% off, or if their choice is more
than 10% slower than the best in hindsight. That is the best of the formats that a plan may take: those far slower than
dense where prompts are processed, it leaves out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import sys
from typing import Any

import machine
import torch
from contest import Call, Contender, console, measure
from rich.table import Table
from shapes import SHAPES
from sparse_kernels import machine_contender

import sparse_backend as sb
from sparse_backend import Options
from sparse_backend.compiler import calibrate, plan
from sparse_backend.compiler.cost import Profile

MOST_OFF, MOST_LOST = 0.25, 0.10
READ_BYTES = 256 << 20
# A product whose weight stays in the cache, as calibration times it: (N, K), share stored, tokens.
SMALL, SMALL_DENSITY, SMALL_TOKENS = (2048, 4096), 0.5, 8


def dense(weight: torch.Tensor) -> list[Contender]:
    """What an engine may multiply by: the plan predicts the faster."""

    def call(which: int) -> Call:
        return calibrate.dense_products([weight.clone()])[which][0]  # in ordinary pages, as engines hold weights

    kinds = len(calibrate.dense_products([weight]))
    return [Contender(f"dense {i}", functools.partial(call, i), weight.nbytes) for i in range(kinds)]


def weight_of(kind: str, zeros: float, n: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator) * 0.02
    if kind == "block":
        kept = torch.rand(-(-n // 16), -(-k // 16), generator=generator) >= zeros
        weight *= kept.repeat_interleave(16, 0)[:n].repeat_interleave(16, 1)[:, :k]
    else:
        weight[torch.rand(n, k, generator=generator) < zeros] = 0
    return weight.sign().bfloat16() * 0.02 if kind == "ternary" else weight.bfloat16()


def probes() -> list[Contender]:
    """What the machine gives just now: its memory, and its instructions."""

    def read() -> Call:
        memory = torch.ones(READ_BYTES // 8, dtype=torch.int64)
        return lambda _: memory.sum()

    def small() -> Call:
        weight = weight_of("random", 1 - SMALL_DENSITY, *SMALL)
        x, layer = torch.randn(SMALL_TOKENS, SMALL[1]).bfloat16(), sb.SparseLinear(sb.pack(weight, "bitmask").lower())
        return lambda _: layer(x)

    # The small one need not be rotated: that it is cached is the point.
    return [Contender("memory", read, READ_BYTES), Contender("compute", functools.cache(small), READ_BYTES)]


def of_the_moment(profile: Profile, memory: float, compute: float) -> Profile:
    """The profile as it would be, had these seconds of the probes been the calibration's."""
    expected = profile.kernels["bitmask/bf16"].per_position(SMALL_DENSITY)[profile.batches.index(SMALL_TOKENS)]
    slower = compute / (expected * math.prod(SMALL))
    kernels = {
        name: dataclasses.replace(k, compute=tuple(tuple(slower * s for s in row) for row in k.compute))
        for name, k in profile.kernels.items()
    }
    return dataclasses.replace(profile, bandwidth=READ_BYTES / memory, kernels=kernels)


def quieter_of_two(
    contenders: list[Contender], xs: dict[int, torch.Tensor], budget_s: float
) -> dict[int, dict[str, float]]:
    """Seconds of each contender by number of tokens, from the one of two rounds that others disturbed less.

    All of one number of tokens are from the same round: what a neighbour takes for a second, it takes from all.
    """
    kept: dict[int, dict[str, float]] = {}
    for _ in range(2):
        for batch, x in xs.items():
            measure(contenders, x, budget_s)
            round_ = {c.name: c.seconds for c in contenders if not c.problem}
            if batch not in kept or sum(map(math.log, round_.values())) < sum(map(math.log, kept[batch].values())):
                kept[batch] = round_
    return kept


def one(shape: str, kind: str, zeros: float, values: str | None, args: Any, profile: Any) -> list[dict[str, Any]]:
    weight = weight_of(kind, zeros, *SHAPES[shape])
    nnz = int(torch.count_nonzero(weight))
    group: dict[str, Contender] = {}
    found = plan.predictions(weight, nnz, Options(values=values), profile)
    allowed = {p.name for p in plan.fit_for_prompts(found, weight, nnz, profile)}
    for p in found:
        if p.pack is None:
            group |= {c.name: c for c in dense(weight)}
        else:
            group[p.name] = machine_contender(p.name, p.pack().lower())
    rows = []
    xs = {batch: torch.randn(batch, weight.shape[1]).bfloat16() for batch in args.batch}
    for x in xs.values():
        exact = x.float() @ weight.float().t()
        for c in group.values():
            if values is None:
                c.check(x, exact)
    problems = {name: c.problem for name, c in group.items()}
    problems["dense"] = " ".join(c.problem for name, c in group.items() if name.startswith("dense ") and c.problem)
    for batch, measured in quieter_of_two([*probes(), *group.values()], xs, args.seconds).items():
        now = of_the_moment(profile, measured["memory"], measured["compute"])
        measured["dense"] = min(seconds for name, seconds in measured.items() if name.startswith("dense "))
        best = min(measured[name] for name in allowed if name in measured)
        decision, informed = (plan.choose(weight, Options(values=values, batch=batch), m) for m in (profile, now))
        chosen, chosen_then = (d.chosen.name if d.chosen else "dense" for d in (decision, informed))
        second = sorted(decision.predictions, key=lambda p: p.seconds)[:2]
        then = {p.name: p.seconds for p in informed.predictions}
        for p in decision.predictions:
            seconds = measured.get(p.name, float("nan"))
            rows.append({
                "shape": shape, "weights": kind, "zeros": zeros, "rounded": values or "", "batch": batch,
                "format": p.name,
                "predicted_us": p.seconds * 1e6, "measured_us": seconds * 1e6,
                "ratio": p.seconds / seconds,
                "gb_per_s": now.bandwidth / 1e9, "compute_us": measured["compute"] * 1e6,
                "ratio_then": then[p.name] / seconds, "chosen": p.name == chosen, "chosen_then": p.name == chosen_then,
                "first_two": p in second, "slower_than_best": seconds / best - 1,
                "problem": problems[p.name],
            })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(SHAPES)
    default = ["qwen3.5-27b gate/up", "qwen3.5-27b down", "llama3-8b o", "bitnet-2b gate/up"]
    parser.add_argument("--shapes", nargs="+", choices=names, default=default, metavar="NAME", help=", ".join(names))
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.0, 0.5, 0.75, 0.9])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=0.25, help="time per measurement, contender and round")
    parser.add_argument("--again", action="store_true", help="measure this machine's profile again first")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.csv and .json")
    args = parser.parse_args()
    profile = calibrate.current_profile(again=args.again)
    console.print(f"{profile.machine}, {profile.bandwidth / 1e9:.1f} GB/s, profile {profile.fingerprint}")
    cases: list[tuple[str, float, str | None]] = [("random", z, None) for z in args.zeros]
    cases += [("random", 0.5, "int8"), ("random", 0.5, "int4"), ("block", 0.7, None), ("ternary", 0.0, None)]
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        for kind, zeros, values in cases:
            rows += one(shape, kind, zeros, values, args, profile)
            show(rows, shape, kind, zeros, values)
    near = [r for r in rows if r["first_two"]]
    for title, ratio, chosen in (
        ("as calibrated", "ratio", "chosen"),
        ("for the machine's speed of the moment", "ratio_then", "chosen_then"),
    ):
        off = [abs(r[ratio] - 1) for r in near]
        lost = [r["slower_than_best"] for r in rows if r[chosen]]
        within = sum(o <= MOST_OFF for o in off) / len(off)
        right = sum(x <= MOST_LOST for x in lost) / len(lost)
        console.print(
            f"{title}: predictions of the first two: median {statistics.median(off):.0%} off, {within:.0%} within "
            f"{MOST_OFF:.0%}, worst {max(off):.0%}; choices: {right:.0%} within {MOST_LOST:.0%} of the best in "
            f"hindsight, worst {max(lost):.0%}, mean {statistics.mean(lost):.1%}"
        )
        passed = within == 1 and right == 1  # of the last: what others take of the machine is not the plan's fault
    if args.save:
        machine.save_results(args.save, rows, {"machine": machine.describe(), "profile": profile.to_json()})
    return 0 if passed and not any(r["problem"] for r in rows) else 1


def show(rows: list[dict[str, Any]], shape: str, kind: str, zeros: float, values: str | None) -> None:
    same = [
        r for r in rows if (r["shape"], r["weights"], r["zeros"], r["rounded"]) == (shape, kind, zeros, values or "")
    ]
    title = f"{shape}, {kind}, {zeros:.0%} zeros{', ' + values if values else ''}"
    table = Table(
        "batch",
        "format",
        "predicted us",
        "measured us",
        "ratio",
        "GB/s",
        "compute us",
        "ratio then",
        "over best",
        "",
        title=title,
    )
    for r in same:
        table.add_row(
            str(r["batch"]), r["format"], f"{r['predicted_us']:.0f}", f"{r['measured_us']:.0f}", f"{r['ratio']:.2f}",
            f"{r['gb_per_s']:.0f}", f"{r['compute_us']:.0f}", f"{r['ratio_then']:.2f}", f"{r['slower_than_best']:+.0%}",
            ("chosen " if r["chosen"] else "") + r["problem"],
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
