"""Numbers of the GPU kernels, on a machine without a GPU: Triton's interpreter on tensors of the CPU.

Triton reads TRITON_INTERPRET when it is imported, which other tests do before: each file runs in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("family", ["rows", "nm", "sell", "ternary", "block", "model"])
def test_family(family):
    file = Path(__file__).parent / f"interpreted_{family}.py"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert re.search(r"skipped|deselected", result.stdout) is None, "a test that does not run proves nothing"
