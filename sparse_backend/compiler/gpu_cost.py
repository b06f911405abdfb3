"""What a multiplication costs on a GPU: predicted from what its kernels read and issue, without measuring any.

A kernel takes the longer of two times, as thousands of threads hide one behind the other: its bytes over the memory's
bandwidth, and its instructions over the rate at which the GPU issues them. Both rates follow from the card's
properties. Instructions per weight are those that tools/gpu_offline.py counts in compiled code for sm_90. None of it
has been checked on a GPU yet: it ranks formats, and is no promise of a time.
"""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any

import torch

# Tokens up to which one kernel serves, the buckets of kernels/triton. Prompts of more are decompressed for torch.
BUCKETS = (1, 2, 16, 32, 64)
# Seconds of a launch inside a CUDA graph.
_OVERHEAD = 2e-6
# Lane instructions a multiprocessor issues per cycle: four schedulers, 32 lanes.
_LANES = 4 * 32
# Multiply-adds of two bytes a multiprocessor's tensor cores do per cycle (sm_80; sm_90 has twice as many).
_TENSOR = 1024


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """One row: what kernels of a format and kind of values need.

    Attributes:
        nbytes: read per stored weight.
        stored, position: instructions per stored weight and per position, for each of BUCKETS.
    """

    nbytes: float
    stored: tuple[float, ...] = (0.0,) * len(BUCKETS)
    position: tuple[float, ...] = (0.0,) * len(BUCKETS)


def _nm(nbytes: float, one: float, two: float, dot: tuple[float, ...]) -> GpuKernel:
    return GpuKernel(nbytes, (one, two, 0, 0, 0), (0, 0, *dot))


def _sell(nbytes: float, one: float, two: float) -> GpuKernel:
    return GpuKernel(nbytes * 1.1, (one, two, 60, 120, 240))  # a tenth is padding


def _block(nbytes: float, dot: tuple[float, ...] = (3.3, 4.0, 5.5)) -> GpuKernel:
    return GpuKernel(nbytes, (7.0, 10.0, *dot))


KERNELS: dict[str, GpuKernel] = {
    "nm/bf16": _nm(2.5, 8.9, 14.7, (12.0, 12.5, 14.0)),
    "nm/fp16": _nm(2.5, 8.9, 14.7, (12.0, 12.5, 14.0)),
    "nm/int8": _nm(1.5, 8.0, 13.5, (12.0, 12.5, 14.0)),
    "nm/int4": _nm(1.0, 13.3, 19.5, (15.0, 15.7, 16.6)),
    "sell/bf16": _sell(3.0, 8.9, 14.0),
    "sell/fp16": _sell(3.0, 8.9, 14.0),
    "sell/int8": _sell(2.0, 8.9, 14.0),
    "sell/int4": _sell(1.5, 9.6, 14.6),
    "block/bf16": _block(2.0),
    "block/fp16": _block(2.0),
    "block/int8": _block(1.0),
    "block/int4": _block(0.5, (19.5, 21.0, 22.0)),
    # Kept activations are three rows each: one token runs the kernel of three, two that of 16, 16 that of 48.
    "ternary/2": GpuKernel(0.25, position=(2.0, 2.2, 6.6, 13.2, 26.4)),
    "ternary/2 int8": GpuKernel(0.25, position=(0.8, 1.2, 1.9, 3.0, 6.0)),
}
for _values in ("", " int8"):
    KERNELS[f"ternary/1.6{_values}"] = KERNELS[f"ternary/2{_values}"]
for _values in ("bf16", "fp16", "int8", "int4"):
    KERNELS[f"bitmask/{_values}"] = KERNELS[f"sell/{_values}"]
_DENSE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclasses.dataclass(frozen=True)
class GpuProfile:
    """One GPU, as plans see it; what cost.Profile is for a CPU.

    Attributes:
        machine: the card's name.
        bandwidth: bytes per second.
        rate: lane instructions per second.
        tensor: multiply-adds of two bytes per second.
        overhead: seconds a call takes however small.
    """

    machine: str
    bandwidth: float
    rate: float
    tensor: float
    overhead: float = _OVERHEAD

    @classmethod
    def of(cls, card: Any) -> GpuProfile:
        """From torch.cuda.get_device_properties(): clocks in kHz, the memory bus in bits, two transfers a clock."""
        cycles = card.multi_processor_count * card.clock_rate * 1e3
        bandwidth = 2 * card.memory_clock_rate * 1e3 * card.memory_bus_width / 8
        return cls(card.name, bandwidth, cycles * _LANES, cycles * _TENSOR * (2 if card.major >= 9 else 1))

    def seconds(self, format: str, values: str, shape: tuple[int, int], density: float, batch: int) -> float | None:
        """Predicted seconds of one product; None if there is no such kernel. Arguments as of cost.Profile."""
        positions = shape[0] * shape[1]
        if format == "dense":
            width = _DENSE_BYTES[values]
            slower = width / 2 * positions * batch / self.tensor
            return self.overhead + max(positions * width / self.bandwidth, slower)
        kernel = KERNELS.get(f"{format}/{values}")
        if kernel is None:
            return None
        stored = positions * density
        bucket = min(bisect.bisect_left(BUCKETS, batch), len(BUCKETS) - 1)
        times = max(1.0, batch / BUCKETS[-1])
        issued = times * (kernel.stored[bucket] * stored + kernel.position[bucket] * positions)
        return self.overhead + max(kernel.nbytes * stored / self.bandwidth, issued / self.rate)


def gpu_profile(device: torch.device) -> GpuProfile:
    """Of a GPU that torch sees."""
    return GpuProfile.of(torch.cuda.get_device_properties(device))
