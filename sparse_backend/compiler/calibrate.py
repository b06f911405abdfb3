"""Measures a Profile: seconds, once per machine, thread count and build of the kernels; then cached.

Every kernel multiplies by weights of a few densities that stay in the last-level cache (so: instructions), and by
the same after something else has filled the cache (so: memory, and what does not overlap with it).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import math
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import envs
from ..diagnosis import cpu_model
from ..errors import OptionError
from ..files import cache_folder, write_text
from ..formats import get_format
from ..kernels import cpu, registry
from ..options import Options
from ..packed import MachineWeight
from .cost import KERNELS, KernelCost, Profile, both, machine_bytes

logger = logging.getLogger("sparse_backend")

BATCHES = (1, 2, 4, 8, 16, 64)
# Of the numbers of tokens, those that are also measured from memory; the others lie between.
_COLD_BATCHES = (1, 8, 64)
# Of the weights: as large as stays in the cache, as every call from memory also takes a while to get going.
_COLUMNS, _FEW_ROWS, _ROWS, _MANY_ROWS = 4096, 64, 2048, 4096
_CACHED_BYTES = 16 << 20
# Read before each turn from memory. Caches keep some of what they were given before: it takes several times their size.
_FILLER_BYTES = 128 << 20
# Seconds to spend on one hot number at a time, and the fewest and most calls it may come from; turns from memory.
_SECONDS = 0.003
_CALLS = (3, 50)
_COLD_ROUNDS = 8
# What is tried for KernelCost.exponent.
_EXPONENTS = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0)
# What weights are pruned to, and what plans choose between: between these, time is not quite a line. Values that round
# get by with two.
_DENSITIES = {"bitmask": (0.1, 0.25, 0.5, 1.0), "sell": (0.1, 0.25, 0.5), "block": (0.2, 0.7)}
_ROUNDED_DENSITIES = {**_DENSITIES, "bitmask": (0.1, 0.5), "sell": (0.1, 0.5)}
_LOSSLESS = ("bf16", "bf16x12")
_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}

Progress = Callable[[int, int, str], None]
Product = Callable[[torch.Tensor], Any]


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


@contextlib.contextmanager
def using(profile: Profile) -> Iterator[None]:
    """Have every plan of this process go by a profile meanwhile, as if it had just been measured."""
    key = (torch.get_num_threads(), cpu.active_isa())
    before = _profiles.get(key)
    _profiles[key] = profile
    try:
        yield
    finally:
        _profiles.pop(key)
        if before is not None:
            _profiles[key] = before


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
    return cache_folder() / f"profile-{fingerprint()}.json"


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
    overhead = _overhead()
    measured: dict[str, _Measured] = {}
    for i, (format, values) in enumerate(KERNELS):
        if progress is not None:
            progress(i, len(KERNELS), f"{format} {values}")
        measured[f"{format}/{values}"] = _Measured(format, values, overhead)
    bandwidths: list[float] = []
    for batch in _COLD_BATCHES:
        bandwidths += _measure_cold([*measured.values()], batch)
        # And hot again, seconds later: on a shared machine a slow moment is never the same kernel's every time.
        for name, m in measured.items():
            if not name.endswith(("/fp16", "/fp32")):  # rare
                m.measure_hot()
    kernels = {name: m.fit() for name, m in measured.items()}
    machine = f"{cpu_model()}, {cpu.active_isa()}, {torch.get_num_threads()} threads"
    if progress is not None:
        progress(len(KERNELS), len(KERNELS), "")
    return Profile(
        machine, fingerprint(), torch.get_num_threads(), statistics.median(bandwidths), overhead, BATCHES, kernels
    )


def _busy() -> bool:
    """Whether all threads together take longer than one, as they do where they must wait for a core."""
    threads = torch.get_num_threads()
    if threads == 1:
        return False
    machine = get_format("bitmask").pack(_weight(0.5)[:_ROWS].bfloat16(), Options()).lower()
    product = partial(_product(machine), _x(_COLUMNS, 1, torch.bfloat16))
    together = _sample(product, 10 * _SECONDS)
    torch.set_num_threads(1)
    alone = _sample(product, 10 * _SECONDS)
    torch.set_num_threads(threads)
    return together > 1.5 * alone


def _measure_cold(measured: list[_Measured], batch: int) -> list[float]:
    """Time all kernels in turn, after something that fills the cache; returns the bandwidth of every turn.

    Each finds its weight in memory because all the others' have passed since.
    """
    filler = torch.ones(_FILLER_BYTES // 8, dtype=torch.int64)
    rates = []
    for _ in range(_COLD_ROUNDS):
        start = time.perf_counter()
        filler.sum()
        rates.append(filler.nbytes / (time.perf_counter() - start))
        for m in measured:
            m.measure_cold(batch, rates[-1])
    return rates


class _Measured:
    """One kernel's measurements, from which its coefficients follow.

    Every product is timed hot, its weight in the last-level cache, and (for `_COLD_BATCHES`) cold.
    """

    def __init__(self, format: str, values: str, overhead: float) -> None:
        self.format, self.values, self.overhead = format, values, overhead
        self.dtype = _DTYPES.get(values, torch.bfloat16)
        self.xs = [_x(_COLUMNS, m, self.dtype) for m in BATCHES]
        # Per alternative, per density: the product, and one of a few rows that warms code, threads and activations.
        self.products: list[list[tuple[Product, Product]]]
        self.densities: tuple[float, ...] = (1.0,)
        self.rows = _ROWS
        if format == "dense":
            weight = _weight(1.0)[:_ROWS].to(self.dtype).clone()
            few = dense_products([weight[:_FEW_ROWS].clone()])
            # What an engine multiplies by: both are measured, and the faster one counts.
            self.products = [[(p[0], f[0])] for p, f in zip(dense_products([weight]), few, strict=True)]
        else:
            self.densities = (_DENSITIES if values in _LOSSLESS else _ROUNDED_DENSITIES).get(format, (1.0,))
            large = machine_bytes(format, values, (_MANY_ROWS, _COLUMNS), _MANY_ROWS * _COLUMNS * self.densities[-1])
            self.rows = _MANY_ROWS if large <= _CACHED_BYTES else _ROWS
            self.products = [[(self._product(d, self.rows), self._product(d, _FEW_ROWS)) for d in self.densities]]
        self.hot = [[[math.inf] * len(BATCHES) for _ in self.densities] for _ in self.products]
        # Per alternative, density and batch of _COLD_BATCHES: (seconds, bandwidth of that moment).
        self.cold: list[list[dict[int, list[tuple[float, float]]]]] = [
            [{m: [] for m in _COLD_BATCHES} for _ in self.densities] for _ in self.products
        ]
        self.measure_hot()

    def measure_hot(self) -> None:
        """Time every product with its weight in the cache (again); what was faster counts."""
        for products, hot in zip(self.products, self.hot, strict=True):
            for (product, _), times in zip(products, hot, strict=True):
                for i, x in enumerate(self.xs):
                    times[i] = min(times[i], max(_sample(partial(product, x)) - self.overhead, 1e-7))

    def measure_cold(self, batch: int, bandwidth: float) -> None:
        """Time every product once, its weight in memory, which just now gives `bandwidth` bytes per second."""
        x = self.xs[BATCHES.index(batch)]
        for products, cold in zip(self.products, self.cold, strict=True):
            for (product, few), times in zip(products, cold, strict=True):
                few(x)
                start = time.perf_counter()
                product(x)
                times[batch].append((max(time.perf_counter() - start - self.overhead, 1e-7), bandwidth))

    def _product(self, density: float, rows: int) -> Product:
        weight = _weight(density, blocks=self.format == "block")[:rows]
        options = Options()
        if self.format == "ternary":
            weight = weight.sign()
            bits, _, activations = self.values.partition(" ")
            options = Options(format="ternary", bits=2 if bits == "2" else 1.6, activations=activations or None)
        elif self.format in ("bitmask", "sell", "block"):
            options = Options(values=self.values)
        return _product(get_format(self.format).pack(weight.to(self.dtype), options).lower())

    def fit(self) -> KernelCost:
        """The coefficients; see cost.py."""
        positions = self.rows * _COLUMNS
        compute = [
            tuple(min(hot[d][i] for hot in self.hot) / positions for i in range(len(BATCHES)))
            for d in range(len(self.densities))
        ]
        exponents, scales = zip(*(self._fit_memory(batch, compute) for batch in _COLD_BATCHES), strict=True)

        def everywhere(points: Sequence[float]) -> tuple[float, ...]:
            return tuple(np.interp(BATCHES, _COLD_BATCHES, points).tolist())

        by_density = tuple(everywhere(points) for points in zip(*scales, strict=True))
        return KernelCost(self.densities, tuple(compute), everywhere(exponents), by_density)

    def _fit_memory(self, batch: int, compute: list[tuple[float, ...]]) -> tuple[float, list[float]]:
        """The exponent that comes nearest to the times from memory, and per density the scale for the rest."""
        shape, i = (self.rows, _COLUMNS), BATCHES.index(batch)
        positions = self.rows * _COLUMNS
        points = []
        for d, density in enumerate(self.densities):
            hot = positions * compute[d][i]
            read = machine_bytes(self.format, self.values, shape, positions * density)
            typical = (
                statistics.median_low(
                    (seconds / (read / rate + hot), seconds, read / rate) for seconds, rate in cold[d][batch]
                )
                for cold in self.cold
            )
            _, seconds, memory = min(typical)
            points.append((seconds, memory, hot))

        def unexplained(exponent: float) -> list[float]:
            return [seconds / both(memory, hot, exponent) for seconds, memory, hot in points]

        def distance(exponent: float) -> float:
            return sum(math.log(scale) ** 2 for scale in unexplained(exponent))

        best = min(_EXPONENTS, key=distance)
        return best, unexplained(best)


@functools.lru_cache(maxsize=4)  # the most densities of a kernel
def _weight(density: float, blocks: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (_MANY_ROWS, _COLUMNS)
    weight = torch.empty(shape).normal_(0, 0.02, generator=generator)
    if blocks:
        kept = torch.rand(shape[0] // 16, shape[1] // 16, generator=generator) < density
        return weight * kept.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return weight * (torch.rand(shape, generator=generator) < density) if density < 1 else weight


def _x(k: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    # Not from torch's own generator: an engine's sampling must not depend on whether a profile was there.
    return torch.empty(tokens, k).normal_(generator=torch.Generator().manual_seed(0)).to(dtype)


def _product(machine: MachineWeight) -> Product:
    run = registry.kernel(machine.format).run
    return lambda x: run(x, machine, None)


def dense_products(weights: list[torch.Tensor]) -> list[list[Product]]:
    """The dense products an engine may run, per product one for each weight: torch's, and where vLLM is, its own."""
    found: list[list[Product]] = [[partial(_linear, w) for w in weights]]
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


def _sample(call: Callable[[], Any], budget: float = _SECONDS) -> float:
    """Seconds of a call: the lower quartile of the quieter half.

    Other processes only ever add, and where threads wait for a core that is busy, most samples are
    milliseconds of waiting: those above twice the fastest do not count.
    """
    times: list[float] = []
    call()
    call()
    while len(times) < _CALLS[0] or (sum(times) < budget and len(times) < _CALLS[1]):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    quiet = sorted(t for t in times if t < 2 * min(times))
    return quiet[len(quiet) // 4]


def _overhead() -> float:
    machine = get_format("bitmask").pack(torch.eye(16).bfloat16(), Options()).lower()
    return _sample(partial(_product(machine), torch.zeros(1, 16, dtype=torch.bfloat16)))
