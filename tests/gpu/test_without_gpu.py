"""What a machine without a GPU, or without Triton, says."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from conftest import sparse_weight

import sparse_backend as sb


@pytest.fixture
def packed():
    return sb.pack(sparse_weight(8, 32, 0.5))


def test_no_gpu_is_an_error_that_says_what_to_do(packed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(sb.IsaError, match=r"sees no GPU here.*TRITON_INTERPRET=1"):
        packed.lower("cuda")
    assert sb.linear(torch.randn(1, 32).bfloat16(), packed).shape == (1, 8)


def test_no_triton_is_an_error_that_says_what_to_install(packed, monkeypatch):
    from sparse_backend.kernels import registry

    real = importlib.import_module

    def missing(name, package=None):
        if name == "triton":
            raise ModuleNotFoundError("No module named 'triton'")
        return real(name, package)

    monkeypatch.setattr(registry.importlib, "import_module", missing)
    for row in registry.rows("cuda"):
        row._resolved.clear()
    with pytest.raises(sb.IsaError, match="pip install triton"):
        packed.lower("cuda")


def test_the_package_and_its_cpu_kernels_import_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, sparse_backend as sb\n"
        "from sparse_backend.kernels import registry\n"
        "w = torch.randn(4, 8).bfloat16(); w[:, ::2] = 0\n"
        "assert sb.linear(torch.randn(1, 8).bfloat16(), sb.pack(w)).shape == (1, 4)\n"
        "assert 'sparse_backend.kernels.triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
