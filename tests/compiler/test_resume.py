"""Interrupted, killed, disturbed: what `compile` keeps, and what it goes on from."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from small_models import CONFIG, SHARD, TERNARY, cli, compiled, fingerprint, interrupt, save_model

from sparse_backend import CheckpointError, Options
from sparse_backend.compiler import calibrate, checkpoint, writer
from sparse_backend.compiler.compile import compile_checkpoint
from sparse_backend.compiler.cost import Profile
from sparse_backend.compiler.verify import verify_checkpoint


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


# One process that forks: each child is killed before its n-th rename or wait for the disk.
KILLER = """
import os, signal, sys
from pathlib import Path
import torch
from sparse_backend import Options
from sparse_backend.compiler import compile, writer
source, out, shard, point, step = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
torch.set_num_threads(1)

def child(point):
    rename, fsync, left = os.rename, os.fsync, [point]
    def step(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    os.rename, os.fsync = step(rename), step(fsync)
    options = Options(sparsity=0.5)
    compile.compile_checkpoint(source, out, options, max_shard_bytes=shard, verify=True, say=print, command="c")

for _ in range(200):
    print("killed at", point, flush=True)
    pid = os.fork()
    if pid == 0:
        child(point)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if out.exists():
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    point += step
else:
    sys.exit("never finished")
"""


# With step 0 every run gets a little further than the one before it; else each takes up what the last one left.
@pytest.mark.parametrize(("first", "step"), [(0, 1), (24, 0)])
def test_killed_anywhere_a_rerun_gives_the_same_bytes(model, tmp_path, first, step):
    out = tmp_path / "out"
    expected, _ = compiled(model, out, Options(sparsity=0.5), command="c")
    command = [sys.executable, "-c", KILLER, *map(str, (model, out, SHARD, first, step))]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("killed at") > 1
    assert "taking up an interrupted run" in result.stdout
    assert fingerprint(out) == expected
    assert checkpoint.read(out).modules
    # What was killed between the last rename and the tidying up is tidied by whoever comes next.
    with pytest.raises(CheckpointError, match="exists already"):
        compile_checkpoint(model, out, Options(sparsity=0.5))


def test_an_interrupted_run_is_taken_up_not_done_again(model, tmp_path):
    out, said, seen = tmp_path / "out", [], []
    expected, whole = compiled(model, out)
    interrupt(model, out, after=10)
    kept = sorted(p.name for p in (tmp_path / ".out.incomplete").glob("shard-*"))
    assert kept
    result, report = compiled(model, out, progress=lambda *a: seen.append(a), say=said.append)
    assert result == expected
    assert report == whole
    assert len(seen) < 18
    assert [s for s in said if "taking up an interrupted run" in s] == said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("layout", ["sparse-compiled", "bitnet"])
def test_bitnet_and_compiled_sources_are_taken_up(tmp_path, layout):
    out, options = tmp_path / "out", Options()
    source = TERNARY
    if layout == "bitnet":
        source = tmp_path / "compiled"
        compile_checkpoint(TERNARY, source, options)
    size = 300_000
    runs = {"layout": layout, "max_shard_bytes": size}
    compile_checkpoint(source, out, options, verify=True, **runs)
    expected = fingerprint(out)
    shutil.rmtree(out)
    calls = 0

    def progress(done, total, what):
        nonlocal calls
        calls += 1
        if calls == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_checkpoint(source, out, options, progress, **runs)
    said = []
    compile_checkpoint(source, out, options, say=said.append, **runs)
    assert "taking up" in said[0]
    assert fingerprint(out) == expected


def test_other_options_or_another_source_start_over(model, tmp_path):
    out = tmp_path / "out"
    for change, word in (
        (lambda: Options(sparsity=0.75), "options differ"),
        (lambda: (model / "config.json").write_text(json.dumps({**CONFIG, "x": 1})) and Options(), "source differ"),
    ):
        interrupt(model, out)
        said, options = [], change()
        result, _ = compiled(model, out, options, say=said.append)
        assert len(said) == 1
        assert word in said[0]
        assert "starting over" in said[0]
        assert result == compiled(model, out, options)[0]


def test_damaged_work_is_not_used(model, tmp_path):
    out, work = tmp_path / "out", tmp_path / ".out.incomplete"
    expected, _ = compiled(model, out)

    def flip(path):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    for damage, message in (
        (lambda: (work / "manifest.json").write_text('{"key": 1'), "manifest of an interrupted run is damaged"),
        (lambda: (work / "manifest.json").write_text('{"key": 1, "shards": [{}]}'), "manifest .* is damaged"),
        (lambda: flip(work / "shard-1.safetensors"), "shard 1 of an interrupted run is damaged"),
        (lambda: flip(work / "shard-2.safetensors"), "shard 2 of an interrupted run is damaged"),
        (lambda: (work / "shard-2.safetensors").unlink(), "shard 2 of an interrupted run is damaged"),
    ):
        interrupt(model, out, after=16)
        damage()
        said = []
        assert compiled(model, out, say=said.append)[0] == expected
        assert any(re.search(message, text) for text in said), said


def test_two_runs_do_not_mix(model, tmp_path):
    out, refused = tmp_path / "out", []

    def progress(done, total, what):
        if not refused:
            with pytest.raises(CheckpointError, match="another run is writing it now") as error:
                compile_checkpoint(model, out, Options(), max_shard_bytes=SHARD)
            refused.append(error)

    compile_checkpoint(model, out, Options(), progress, max_shard_bytes=SHARD)
    assert refused
    assert verify_checkpoint(model, out) == 18


def test_a_full_disk_keeps_whole_shards_and_says_how_much_is_missing(model, tmp_path):
    out = tmp_path / "out"
    expected, _ = compiled(model, out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def progress(done, total, what):
        if (tmp_path / ".out.incomplete" / "shard-2.safetensors").exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # Python ignores the signal: writes fail

    try:
        with pytest.raises(CheckpointError, match=r"cannot be written: .* more are needed, .* are free") as error:
            compile_checkpoint(model, out, Options(), progress, max_shard_bytes=SHARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the same command goes on from them" in str(error.value)
    assert not out.exists()
    assert not (tmp_path / ".out.incomplete" / "shard.new").exists()
    said = []
    assert compiled(model, out, say=said.append)[0] == expected
    assert "taking up" in said[0]


def test_a_run_goes_on_by_the_profile_it_began_with(model, tmp_path, monkeypatch):
    """A machine too busy for its profile to be kept: every process measures another one."""
    recorded = Profile.load(ROOT / "tests" / "profile.json")
    measured = []

    def measure(progress=None):
        # Dense products get faster and faster: what was packed in the first run would stay dense in the next.
        measured.append(1)
        dense = recorded.kernels["dense/bf16"]
        faster = tuple(tuple(t / 1000 ** (len(measured) - 1) for t in row) for row in dense.compute)
        kernels = {**recorded.kernels, "dense/bf16": dataclasses.replace(dense, compute=faster)}
        return dataclasses.replace(recorded, kernels=kernels, threads=torch.get_num_threads() + 1)

    monkeypatch.delenv("SPARSE_BACKEND_PROFILE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "calibrate", measure)
    monkeypatch.setattr(calibrate, "_profiles", {})
    expected, _ = compiled(model, tmp_path / "out")
    calibrate._profiles.clear()
    measured.clear()
    interrupt(model, tmp_path / "out", after=10)
    calibrate._profiles.clear()  # another process
    said = []
    assert compiled(model, tmp_path / "out", say=said.append)[0] == expected
    assert [s for s in said if "taking up an interrupted run" in s] == said
    assert len(measured) == 1
    assert not calibrate._profiles
    # Other options are another run: it plans by what it measures.
    interrupt(model, tmp_path / "out", after=10)
    calibrate._profiles.clear()
    said.clear()
    compile_checkpoint(model, tmp_path / "out", Options(batch=2, sparsity=0.9), say=said.append, max_shard_bytes=SHARD)
    assert "options, machine differ" in said[0]
    assert len(measured) == 3


@pytest.mark.parametrize(
    ("flags", "after", "message"),
    [
        (("--dry-run",), 3, "a dry run writes nothing"),
        ((), 0, "before the first shard was whole; nothing is kept"),
        ((), 12, "shards that are whole are kept"),
    ],
)
def test_interrupting_says_what_is_kept(model, tmp_path, monkeypatch, flags, after, message):
    done = writer.Writer.done
    left = [after]

    def interrupted(self, result):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        self.max_shard_bytes = SHARD
        done(self, result)

    monkeypatch.setattr(writer.Writer, "done", interrupted)
    result = cli("compile", model, tmp_path / "out", *flags)
    assert result.exit_code == 130
    assert message in result.output
    assert (tmp_path / ".out.incomplete").exists() == (after == 12)
