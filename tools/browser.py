"""The headless browser of tests/test_report_browser.py: `python tools/browser.py` prints where it is.

With --install, installs Debian's (or Ubuntu's) chromium if there is none. Standard library only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLACES = ("/usr/bin", "/usr/local/bin", "/usr/lib/chromium", "/opt/google/chrome", "/snap/bin")


def find() -> str | None:
    """A Chromium or Chrome on PATH or in the usual places."""
    path = os.pathsep.join((os.environ.get("PATH", ""), *PLACES))
    return next((found for name in NAMES if (found := shutil.which(name, path=path))), None)


def install() -> None:
    if shutil.which("apt-get") is None:
        sys.exit("[env] stopped: no apt-get here; install Chromium or Chrome by hand, on PATH, then run make again")
    root = [] if os.geteuid() == 0 else ["sudo"]
    if root and shutil.which("sudo") is None:
        sys.exit("[env] stopped: installing chromium needs root or sudo; or install a Chromium or Chrome on PATH")
    print("[env] installing chromium (half a minute)", flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for args in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
        done = subprocess.run([*root, "apt-get", *args], env=quiet, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"[env] stopped: apt-get {args[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    if find() is None and sys.argv[1:] == ["--install"]:
        install()
    browser = find()
    if browser is None:
        sys.exit("[env] stopped: no Chromium or Chrome found; run make env-browser")
    if sys.argv[1:] != ["--install"]:
        print(browser)
