"""Machine code of the GPU kernels: the few that tools/gpu_offline.py --quick compiles, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import ROOT


def test_code_keeps_its_promises(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_offline.py"), "--quick"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" ok\n") >= 10
