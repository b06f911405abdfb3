"""Numbers of the GPU kernels, on a machine without a GPU: Triton's interpreter on tensors of the CPU.

Triton reads TRITON_INTERPRET when it is imported, which other tests do before: each file runs in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FAMILIES = ("model", "nm", "sell", "ternary", "block", "rows")  # the longest first


def run(family: str) -> subprocess.CompletedProcess[str]:
    file = Path(__file__).parent / f"interpreted_{family}.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs():
    """All files, as many at a time as there are cores: the interpreter keeps one busy."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {family: pool.submit(run, family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, runs):
    result = runs[family].result()
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert re.search(r"skipped|deselected", result.stdout) is None, "a test that does not run proves nothing"
