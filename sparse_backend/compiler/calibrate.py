"""Measures a Profile: seconds, once per machine, thread count and build of the kernels; then cached.

Every kernel multiplies two weights of different density that stay in the last-level cache (so: instructions), and
copies of a large one, which do not (so: memory, and what does not overlap with it).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import envs
from ..diagnosis import cpu_model
from ..errors import OptionError
from ..files import write_text
from ..formats import get_format
from ..kernels import cpu, registry
from ..options import Options
from ..packed import MachineWeight
from .cost import KERNELS, KernelCost, Profile, machine_bytes

logger = logging.getLogger("sparse_backend")

BATCHES = (1, 2, 4, 8, 16, 64)
_SMALL = (2048, 2048)
_LARGE = (4096, 4096)
# Copies of a large weight are read in turn until so much has passed: more than caches hold.
_STREAMED_BYTES = 128 << 20
# Seconds to spend on one number, and the fewest and most calls it may come from.
_SMALL_SECONDS, _LARGE_SECONDS = 0.007, 0.07
_CALLS = (4, 80)
_MADV_HUGEPAGE = 14
_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}

Progress = Callable[[int, int, str], None]


def current_profile(progress: Progress | None = None, again: bool = False) -> Profile:
    """The profile of this machine, kernel level and number of torch threads.

    SPARSE_BACKEND_PROFILE names a file to use instead of measuring. Otherwise it is measured the first
    time (under 20 seconds on two cores) and kept in the user's cache folder.

    Args:
        progress: called as (kernels done, kernels in all, kernel).
        again: measure even if there is one.

    Raises:
        OptionError: SPARSE_BACKEND_PROFILE names no profile.
    """
    given = envs.profile()
    if given is not None and not again:
        return _given(given)
    return _cached(torch.get_num_threads(), cpu.active_isa(), progress) if not again else _measure_and_keep(progress)


@functools.cache
def _given(path: str) -> Profile:
    return Profile.load(Path(path))


_profiles: dict[tuple[int, str], Profile] = {}


def _cached(threads: int, isa: str, progress: Progress | None) -> Profile:
    if (threads, isa) not in _profiles:
        path = cache_file()
        with _lock(path):
            try:
                profile = Profile.load(path)
            except OptionError:
                profile = _measure_and_keep(progress)
        _profiles[threads, isa] = profile
    return _profiles[threads, isa]


def _measure_and_keep(progress: Progress | None) -> Profile:
    logger.info("measuring this machine's kernels once (up to 20 s); kept in %s", cache_file())
    threads = torch.get_num_threads()
    profile = calibrate(progress)
    if profile.threads != threads:
        logger.warning(
            "other processes keep this machine's cores busy: planned with figures of one thread, which are not kept; "
            "run 'sparse-backend calibrate' when it is idle"
        )
        return profile
    try:
        save(profile, cache_file())
    except OSError as error:
        logger.warning("the machine profile cannot be kept (%s): every process will measure again", error)
    _profiles[threads, cpu.active_isa()] = profile
    return profile


@functools.cache
def _library_digest(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


def fingerprint() -> str:
    """What a profile depends on: processor, kernel level and build, torch, threads, whether vLLM is there."""
    library = _library_digest(Path(cpu.__file__).parents[1] / "_C.so")
    vllm = importlib.util.find_spec("vllm") is not None
    parts = (cpu_model(), sorted(cpu.features().items()), cpu.active_isa(), torch.get_num_threads(), library, vllm)
    return hashlib.sha256(repr((parts, torch.__version__)).encode()).hexdigest()[:16]


def cache_file() -> Path:
    """Where this machine's profile is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # without a home, in this folder
    return Path(base) / "sparse_backend" / f"profile-{fingerprint()}.json"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process measures, the others (tensor-parallel ranks) wait for it; without a folder, each by itself."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # read-only, or a file system without locks
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.with_suffix(".lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def save(profile: Profile, path: Path) -> None:
    """Write a profile; it appears only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(profile.to_json(), indent=1) + "\n")


def calibrate(progress: Progress | None = None) -> Profile:
    """Measure every kernel on this machine, with torch's present number of threads.

    Where other processes keep the cores so busy that threads wait for each other, one thread is measured
    instead, and the profile says so: formats still compare rightly then.
    """
    threads = torch.get_num_threads()
    try:
        if _busy():
            torch.set_num_threads(1)
        return _calibrate(progress)
    finally:
        torch.set_num_threads(threads)
        _weight.cache_clear()


def _calibrate(progress: Progress | None) -> Profile:
    probe = torch.ones(1 << 25, dtype=torch.int64)
    bandwidth = probe.nbytes / _sample([probe.sum], _LARGE_SECONDS)
    del probe
    overhead = _overhead()
    measured: dict[str, _Measured] = {}
    for i, (format, values) in enumerate(KERNELS):
        if progress is not None:
            progress(i, len(KERNELS), f"{format} {values}")
        measured[f"{format}/{values}"] = _Measured(format, values, overhead)
    # A second round, seconds later: on a shared machine a slow moment is never the same kernel's twice.
    for name, m in measured.items():
        if not name.endswith(("/fp16", "/fp32")):  # rare
            m.measure()
    # What a kernel really read faster than the probe is the better probe.
    bandwidth = max([bandwidth, *(m.bytes / m.seconds for m in measured.values())])
    kernels = {name: m.fit(bandwidth) for name, m in measured.items()}
    machine = f"{cpu_model()}, {cpu.active_isa()}, {torch.get_num_threads()} threads"
    if progress is not None:
        progress(len(KERNELS), len(KERNELS), "")
    return Profile(machine, fingerprint(), torch.get_num_threads(), bandwidth, overhead, BATCHES, kernels)


def _busy() -> bool:
    """Whether all threads together take longer than one, as they do where they must wait for a core."""
    threads = torch.get_num_threads()
    if threads == 1:
        return False
    machine = get_format("bitmask").pack(_weight(_SMALL, 0.5, "").bfloat16(), Options()).lower()
    product = _product(machine, _x(_SMALL[1], 1, torch.bfloat16))
    together = _sample([product], _LARGE_SECONDS)
    torch.set_num_threads(1)
    alone = _sample([product], _LARGE_SECONDS)
    torch.set_num_threads(threads)
    return together > 1.5 * alone


class _Measured:
    """One kernel's measurements, from which its coefficients follow once the bandwidth is known."""

    def __init__(self, format: str, values: str, overhead: float) -> None:
        self.format, self.values, self.overhead = format, values, overhead
        self.dtype = _DTYPES.get(values, torch.bfloat16)
        # Per density, per number of tokens: what to call, and the seconds it took.
        self.calls: list[list[list[Callable[[], Any]]]] = []
        self.densities: tuple[float, ...]
        self.budget = _SMALL_SECONDS
        if format == "dense":
            weights = [_weight(_LARGE, 1.0, "").to(self.dtype).clone() for _ in range(3)]
            xs = [_x(_LARGE[1], m, self.dtype) for m in BATCHES]
            # What an engine multiplies by: both are sampled, and the faster one counts.
            self.calls = [[[partial(p, x) for p in products] for x in xs] for products in dense_products(weights)]
            self.densities = (0.0,) * len(self.calls)
            self.budget = _LARGE_SECONDS / 2
        else:
            # sell is for few stored weights, where padding is what differs.
            self.densities = (
                (0.4, 0.05) if format == "sell" else (0.7, 0.2) if format in ("bitmask", "block") else (1.0,)
            )
            for density in self.densities:
                machine = self._machine(_SMALL, density)
                self.calls.append([[_product(machine, _x(_SMALL[1], m, self.dtype))] for m in BATCHES])
        self.times = [[float("inf")] * len(BATCHES) for _ in self.densities]
        self.measure()
        if format == "dense":
            self.bytes, self.seconds = weights[0].nbytes, min(times[0] for times in self.times)
            return
        self.streamed = self.densities[-1] if format == "sell" else self.densities[0]
        machine = self._machine(_LARGE, self.streamed)
        self.bytes = machine.nbytes
        x = _x(_LARGE[1], 1, self.dtype)
        copies = [_copy(machine) for _ in range(min(24, 1 + _STREAMED_BYTES // self.bytes))]
        self.seconds = _sample([_product(copy, x) for copy in copies], _LARGE_SECONDS)

    def measure(self) -> None:
        """Sample everything that is kept (again); what was faster counts."""
        for calls, times in zip(self.calls, self.times, strict=True):
            for i, call in enumerate(calls):
                times[i] = min(times[i], max(_sample(call, self.budget) - self.overhead, 1e-7))

    def _machine(self, shape: tuple[int, int], density: float) -> MachineWeight:
        weight = _weight(shape, density, "block" if self.format == "block" else "")
        options = Options()
        if self.format == "ternary":
            weight = weight.sign()
            bits, _, activations = self.values.partition(" ")
            options = Options(format="ternary", bits=2 if bits == "2" else 1.6, activations=activations or None)
        elif self.format in ("bitmask", "sell", "block"):
            options = Options(values=self.values)
        return get_format(self.format).pack(weight.to(self.dtype), options).lower()

    def fit(self, bandwidth: float) -> KernelCost:
        """The coefficients; see cost.py."""
        if self.format == "dense":
            positions = _LARGE[0] * _LARGE[1]
            fastest = [min(times) / positions for times in zip(*self.times, strict=True)]
            return KernelCost(tuple(fastest), (0.0,) * len(BATCHES), 0.0, 0.0)
        positions = _SMALL[0] * _SMALL[1]
        per_position, per_stored = [], []
        for i in range(len(BATCHES)):
            first, t0 = self.densities[0], self.times[0][i] / positions
            last, t1 = self.densities[-1], self.times[-1][i] / positions
            slope = max(0.0, (t0 - t1) / (first - last)) if first != last else 0.0
            per_position.append(max(0.0, t1 - slope * last))
            per_stored.append(slope)
        large = _LARGE[0] * _LARGE[1]
        compute = per_position[0] * large + per_stored[0] * large * self.streamed
        memory = machine_bytes(self.format, self.values, _LARGE, large * self.streamed) / bandwidth
        longer, shorter = max(compute, memory), min(compute, memory)
        overlap = min(1.0, max(0.0, (self.seconds - longer) / shorter))
        slower = max(1.0, (self.seconds - compute) / memory) if overlap == 1.0 else 1.0
        return KernelCost(tuple(per_position), tuple(per_stored), overlap, slower)


@functools.lru_cache(maxsize=6)
def _weight(shape: tuple[int, int], density: float, pattern: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(shape).normal_(0, 0.02, generator=generator)
    if pattern == "block":
        kept = torch.rand(shape[0] // 16, shape[1] // 16, generator=generator) < density
        return weight * kept.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return weight * (torch.rand(shape, generator=generator) < density) if density < 1 else weight


def _x(k: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    # Not from torch's own generator: an engine's sampling must not depend on whether a profile was there.
    return torch.empty(tokens, k).normal_(generator=torch.Generator().manual_seed(0)).to(dtype)


def _copy(machine: MachineWeight) -> MachineWeight:
    """In huge pages, as lowering leaves a machine form."""
    copies = {name: _huge_pages(torch.empty_like(t)).copy_(t) for name, t in machine.tensors.items()}
    return dataclasses.replace(machine, tensors=copies)


def _huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    page = 2 << 20
    begin = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)
    return tensor


def _product(machine: MachineWeight, x: torch.Tensor) -> Callable[[], Any]:
    return partial(registry.kernel(machine.format).run, x, machine, None)


def dense_products(weights: list[torch.Tensor]) -> list[list[Callable[[torch.Tensor], Any]]]:
    """The dense products an engine may run, per product one for each weight: torch's, and where vLLM is, its own."""
    found: list[list[Callable[[torch.Tensor], Any]]] = [[partial(_linear, w) for w in weights]]
    ops = _vllm_ops()
    if ops is not None:
        try:
            handles = [ops.create_onednn_mm(w.t(), 32) for w in weights]
            found.append([partial(_onednn, ops, handle) for handle in handles])
            found[-1][0](_x(weights[0].shape[1], 1, weights[0].dtype))
        except RuntimeError:  # it has none for this processor or dtype
            del found[1:]
    return found


def _linear(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight)


def _onednn(ops: Any, handle: Any, x: torch.Tensor) -> Any:
    return ops.onednn_mm(handle, x, None)


@functools.cache
def _vllm_ops() -> Any:
    """vLLM's ops where its CPU build is installed; plans have to beat what it would run."""
    if importlib.util.find_spec("vllm") is None:
        return None
    try:
        return importlib.import_module("vllm._custom_ops")
    except ImportError:  # a build for another device
        return None


def _sample(calls: list[Callable[[], Any]], budget: float) -> float:
    """Seconds of a call, calls taken in turn: the lower quartile of the quieter half.

    Other processes only ever add, and where threads wait for a core that is busy, most samples are
    milliseconds of waiting: those above twice the fastest do not count.
    """
    times: list[float] = []
    for call in calls[:2]:
        call()
    while len(times) < _CALLS[0] or (sum(times) < budget and len(times) < _CALLS[1]):
        call = calls[len(times) % len(calls)]
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    quiet = sorted(t for t in times if t < 2 * min(times))
    return quiet[len(quiet) // 4]


def _overhead() -> float:
    machine = get_format("bitmask").pack(torch.eye(16).bfloat16(), Options()).lower()
    return _sample([_product(machine, torch.zeros(1, 16, dtype=torch.bfloat16))], _SMALL_SECONDS)
