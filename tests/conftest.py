from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from sparse_backend.kernels import cpu

ROOT = Path(__file__).resolve().parents[1]
# Plans must not differ from machine to machine here: every process plans with one recorded profile.
os.environ["SPARSE_BACKEND_PROFILE"] = str(ROOT / "tests" / "profile.json")
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "engines")]
PYTHON_LM = ROOT / "models" / "python-lm"


def sparse_weight(n: int, k: int, zeros: float, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    weight[torch.rand(n, k, generator=generator) < zeros] = 0
    return weight


def blocks_of_zeros(
    n: int, k: int, zeros: float, size: int = 16, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-n // size), -(-k // size), generator=generator) >= zeros
    kept = kept.repeat_interleave(size, 0)[:n].repeat_interleave(size, 1)[:, :k]
    return (torch.randn(n, k, generator=generator) * kept).to(dtype)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """A test that fails once in a hundred runs says nothing about the change it fails for."""
    torch.manual_seed(0)


@pytest.fixture(params=cpu.available_levels())
def isa(request: pytest.FixtureRequest):
    """Every kernel level this machine runs."""
    with cpu.forced_isa(request.param):
        yield request.param


@pytest.fixture(scope="session")
def python_lm() -> Path:
    return PYTHON_LM


@pytest.fixture(scope="session")
def python_lm_50(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, pruned to 50% and compiled."""
    from sparse_backend import Options
    from sparse_backend.compiler.compile import compile_checkpoint

    target = tmp_path_factory.mktemp("models") / "python-lm-50"
    compile_checkpoint(PYTHON_LM, target, Options(sparsity=0.5))
    return target


@pytest.fixture(scope="session")
def pruned_50(python_lm_50, tmp_path_factory) -> Path:
    """The same pruned model as a plain checkpoint."""
    from random_models import plain_copy

    folder = tmp_path_factory.mktemp("models") / "python-lm-pruned"
    plain_copy(python_lm_50, folder)
    return folder
