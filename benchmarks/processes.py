"""Processes that benchmarks and tests start: jobs of an engine, and servers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def run_jobs(
    python: str, script: str, jobs: list[dict[str, Any]], environment: Mapping[str, str], timeout: float
) -> list[dict[str, Any]]:
    """`python script jobs.json results.json` in a folder of its own; results carry the output as `log`.

    Not in the caller's folder: the installed package is what is tested.
    """
    with tempfile.TemporaryDirectory() as folder:
        spec, out, log = (Path(folder) / name for name in ("jobs.json", "results.json", "log.txt"))
        spec.write_text(json.dumps(jobs))
        command = [python, str(Path(script).resolve()), str(spec), str(out)]
        with log.open("w") as text:
            try:
                code: object = subprocess.run(
                    command, env=environment, cwd=folder, stdout=text, stderr=text, timeout=timeout, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"a timeout of {timeout:.0f} s"
        if not out.exists():
            raise RuntimeError(f"the engine process ended with {code} before its results:\n{log.read_text()[-6000:]}")
        results: list[dict[str, Any]] = json.loads(out.read_text())
        for result in results:
            result["log"] = log.read_text()
        return results


def answer_jobs(run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The other end of `run_jobs`: all results or none; a job that `may_fail` gives its `error`."""
    results = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            results.append(run(job))
        except Exception as error:
            traceback.print_exc()
            if not job.get("may_fail"):
                raise
            results.append({"error": f"{type(error).__name__}: {error}"})
    part = Path(sys.argv[2]).with_suffix(".part")
    part.write_text(json.dumps(results))
    part.rename(sys.argv[2])


@contextlib.contextmanager
def serving(
    command: Callable[[int], list[str]], environment: Mapping[str, str], log: Path, health: str = "/health"
) -> Iterator[tuple[str, int]]:
    """A server for a with block: (its url, its process id), once it answers; gone with all its processes after it.

    `command` gets a free port of 127.0.0.1; `health` is the path that answers 200.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with log.open("w") as out:
        process = subprocess.Popen(
            command(port), env=environment, stdout=out, stderr=out, cwd=log.parent, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while not _answers(f"{url}{health}"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield url, process.pid
    finally:
        # The group, not the process: a server that died may have left others.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
