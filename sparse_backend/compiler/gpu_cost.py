"""What a multiplication costs on a GPU: predicted from what its kernels read and issue, without measuring any.

A kernel takes the longer of two times, as thousands of threads hide one behind the other: its bytes over the memory's
bandwidth, and its instructions over the rate at which the GPU issues them. Both rates follow from the card's
properties. Instructions per weight are those that tools/gpu_offline.py counted in code for sm_90 (Triton 3.9). None of
it has been checked on a GPU yet: it ranks formats, and is no promise of a time.
"""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any, ClassVar

import torch

# Tokens up to which one kernel serves, the buckets of kernels/triton. More are decompressed for torch's product.
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
        scales: bytes of scales read per position.
    """

    nbytes: float
    stored: tuple[float, ...] = (0.0,) * len(BUCKETS)
    position: tuple[float, ...] = (0.0,) * len(BUCKETS)
    scales: float = 0.0


# int4 comes with scales of 128 columns unless options say otherwise; its counts are for those.
_INT4 = 4 / 128


def _nm(nbytes: float, one: float, two: float, dot: tuple[float, ...], scales: float = 0.0) -> GpuKernel:
    return GpuKernel(nbytes, (one, two, 0, 0, 0), (0, 0, *dot), scales)


def _sell(nbytes: float, one: float, two: float, sixteen: float = 59.0, scales: float = 0.0) -> GpuKernel:
    # A tenth is padding.
    return GpuKernel(nbytes * 1.1, (one, two, sixteen, 2 * sixteen, 4 * sixteen), scales=scales)


_HALVES = {
    "nm": _nm(2.5, 8.9, 14.8, (10.9, 12.4, 11.2)),
    "sell": _sell(3.0, 9.2, 14.2),
    "block": GpuKernel(2.0, (6.2, 8.8, 3.3, 5.3, 7.6)),
}
KERNELS: dict[str, GpuKernel] = {
    **{f"{format}/{values}": row for format, row in _HALVES.items() for values in ("bf16", "bf16x12", "fp16")},
    "nm/int8": _nm(1.5, 8.0, 14.4, (12.6, 12.6, 12.9)),
    "nm/int4": _nm(1.0, 13.1, 18.9, (15.5, 15.9, 16.8), _INT4),
    "sell/int8": _sell(2.0, 8.6, 13.7, 57.2),
    "sell/int4": _sell(1.5, 18.5, 23.5, 75.4, _INT4),
    "block/int8": GpuKernel(1.0, (6.3, 8.9, 7.1, 13.7, 18.2)),
    "block/int4": GpuKernel(0.5, (9.3, 12.0, 27.2, 34.5, 34.5), scales=_INT4),
    # Kept activations are three rows each: one token runs the kernel of three, two that of 16, 16 that of 64, and 64
    # run that three times.
    "ternary/2": GpuKernel(0.25, position=(1.6, 1.4, 1.6, 3.2, 4.8)),
    "ternary/2 int8": GpuKernel(0.25, position=(0.8, 1.1, 1.4, 1.3, 1.6)),
}
for _values in ("", " int8"):
    KERNELS[f"ternary/1.6{_values}"] = KERNELS[f"ternary/2{_values}"]
for _values in ("bf16", "bf16x12", "fp16", "int8", "int4"):
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

    # What prompts are judged by: a weight is decompressed for them, at a cost that many tokens share.
    prompt_tokens: ClassVar[int] = 2048

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
            return self._dense(_DENSE_BYTES[values], positions, batch)
        kernel = KERNELS.get(f"{format}/{values}")
        if kernel is None:
            return None
        stored = positions * density
        read = (kernel.nbytes * stored + kernel.scales * positions) / self.bandwidth
        if batch > BUCKETS[-1]:
            return self._dense(2, positions, batch) + read + 2 * positions / self.bandwidth
        bucket = bisect.bisect_left(BUCKETS, batch)
        issued = kernel.stored[bucket] * stored + kernel.position[bucket] * positions
        return self.overhead + max(read, issued / self.rate)

    def _dense(self, width: int, positions: int, batch: int) -> float:
        product = width / 2 * positions * batch / self.tensor
        return self.overhead + max(positions * width / self.bandwidth, product)


def gpu_profile(device: torch.device) -> GpuProfile:
    """Of a GPU that torch sees."""
    return GpuProfile.of(torch.cuda.get_device_properties(device))
