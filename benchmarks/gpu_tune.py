"""Finds launch settings for this GPU: every one of a kernel's grid is checked, timed, and the fastest kept."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from gpu_contenders import contender, copies, random_weight
from rich.progress import track

from sparse_backend.kernels.triton import tuning

# Which contender of gpu_contenders.py stands for a family; its batch is the rows of a kernel.
EXAMPLES = {
    "nm": "8:16 bf16 (50%)", "sell": "sell bf16 (90%)", "ternary": "ternary 2-bit, int8 x", "block": "block bf16 (50%)",
}  # fmt: skip
SHAPE = (17408, 5120)
BETTER = 0.02  # by which another setting has to be faster than the default


def tune(device: torch.device, timed: bool, error_of: Any, measure: Any) -> dict[str, tuning.Launches]:
    """The fastest settings of every family; without a clock, the defaults, once the ends of each grid were checked."""
    n, k = SHAPE if timed else (64, 256)
    found = {}
    for family, name in EXAMPLES.items():
        c = contender(name, random_weight(n, k, device))
        calls = copies(c, device, timed)
        chosen = dict(tuning.defaults(family))
        for key in track(chosen, f"{family}: kernels", disable=not sys.stderr.isatty()):
            if key[0] == "decompress":
                continue
            x = torch.randn(key[1], k, device=device).bfloat16()
            settings = list(dict.fromkeys([chosen[key], *tuning.grid(family, key)]))
            times = {}
            for launch in settings if timed else settings[:1] + settings[-1:]:
                with tuning.trying(family, key, launch):
                    error = error_of(c, calls[0], x)
                    if not error <= c.tolerance:
                        raise SystemExit(f"{family} {key} with {launch}: WRONG, error {error:.1e}")
                    times[launch] = measure(calls, c.prepare(x))[0] if timed else 0.0
            best = min(times, key=lambda launch: times[launch])
            if timed:
                before, after = (times[launch] * 1e6 for launch in (chosen[key], best))
                print(f"{family} {key[0]} {key[1]}: {before:.1f} us, best {after:.1f} us {best}")
            if times[best] < times[chosen[key]] * (1 - BETTER):
                chosen[key] = best
        found[family] = chosen
    return found


def tune_and_save(device: torch.device, timed: bool, error_of: Any, measure: Any, to: Path | None) -> int:
    """What `benchmarks/gpu.py --tune` does; exit status."""
    settings = tune(device, timed, error_of, measure)
    card = torch.cuda.get_device_name(device) if timed else "no card"
    path = to or tuning.user_file(card)
    if timed or to is not None:
        tuning.save(path, card, settings)
        print(f"wrote {path}; to ship it, copy it to {tuning.SHIPPED}/{tuning.slug(card)}.json")
    return 0
