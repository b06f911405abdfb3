"""Build the C++ tests with AddressSanitizer and UBSan and run them: `make test-asan`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    build = ROOT / "build" / "asan"
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DSPARSE_BACKEND_SANITIZE=ON",
                 "-DSPARSE_BACKEND_TESTS=ON", f"-DPython3_EXECUTABLE={sys.executable}"]  # fmt: skip
    # cmake and ninja of this environment, if pip put them there, before the system's.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    for command in (
        configure,
        ["cmake", "--build", str(build), "--target", "kernels_test"],
        [str(build / "kernels_test")],
    ):
        if subprocess.run(command, env=environment, check=False).returncode != 0:
            print(f"failed: {' '.join(command)}", file=sys.stderr)
            return 1
    print("1 passed, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
