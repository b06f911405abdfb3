"""Contenders that take turns: the rules of every kernel benchmark.

All contenders of a group run in one loop (this may be a shared machine). Each makes one call that is not
timed before each that is, and rotates over copies of its weight, so many that 8 times the last-level cache is
read before one of them comes back, in either kind of call; medians are compared. A result that is wrong has no speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import machine
import torch
import torch.nn.functional as F
from rich.console import Console

console = Console(width=max(110, Console().width))
Call = Callable[[torch.Tensor], torch.Tensor]


class Contender:
    """One way to compute the layer: make() copies its weight, of which a call reads `nbytes`."""

    def __init__(self, name: str, make: Callable[[], Call], nbytes: int) -> None:
        self.name, self.make, self.nbytes = name, make, nbytes
        self.calls = [make()]
        self.times: list[float] = []
        self.turn = 0
        self.problem = ""
        self.reference: torch.Tensor | None = None  # its weight, if it is another one than the group's

    def check(self, x: torch.Tensor, expected: torch.Tensor) -> None:
        y = self.calls[0](x).double()
        error = (y - expected).norm() / expected.norm().clamp_min(1e-30)
        if not bool(torch.isfinite(y).all()) or error > 2e-2:
            self.problem = f"WRONG ({error:.1e})"

    def once(self, x: torch.Tensor) -> None:
        # Not timed: another contender's threads may still spin, and its code is in the caches. Half a rotation away,
        # so that it does not bring the next turns' copies into the cache.
        self.calls[(self.turn + len(self.calls) // 2) % len(self.calls)](x)
        call = self.calls[self.turn % len(self.calls)]
        self.turn += 1
        start = time.perf_counter()
        call(x)
        self.times.append(time.perf_counter() - start)

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)


def rotate(group: list[Contender]) -> None:
    """As many copies as the caches ask for: in a round everyone reads two of its own, half a rotation apart."""
    round_bytes = 2 * sum(c.nbytes for c in group)
    count = 2 * -(-8 * machine.last_level_cache() // max(1, round_bytes))
    for c in group:
        c.calls += [c.make() for _ in range(min(count, 400) - len(c.calls))]


def dense_peers(weight: torch.Tensor) -> list[Contender]:
    """F.linear, and vLLM's prepacked oneDNN matmul where it runs."""

    def dense() -> Call:
        w = machine.huge(torch.empty_like(weight)).copy_(weight)
        return lambda x: F.linear(x, w)

    out = [Contender("F.linear", dense, weight.nbytes)]
    try:
        import vllm._custom_ops as ops

        def onednn() -> Call:
            handle = ops.create_onednn_mm(weight.t(), 32)
            return lambda x: ops.onednn_mm(handle, x, None)

        out.append(Contender("onednn_mm", onednn, weight.nbytes))
    except RuntimeError as error:
        console.print(f"onednn_mm does not run here: {str(error).splitlines()[0][:100]}", highlight=False)
    return out


def measure(group: list[Contender], x: torch.Tensor, budget_s: float) -> None:
    rotate([c for c in group if not c.problem])
    for c in group:
        c.times = []
        if not c.problem:
            c.once(x)
            c.times = []
    start = time.perf_counter()
    rounds = 0
    while rounds < 5 or (time.perf_counter() - start < budget_s and rounds < 200):
        for c in group:
            # A slow peer need not be measured to three digits.
            if not c.problem and (rounds < 5 or sum(c.times) < budget_s):
                c.once(x)
        rounds += 1


def fastest(group: list[Contender], names: tuple[str, ...]) -> float:
    """Seconds of the fastest of these that ran and was right; NaN if none."""
    return min((c.seconds for c in group if c.name in names and not c.problem), default=float("nan"))
