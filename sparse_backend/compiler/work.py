"""The folder a compile works in: locked, and good for going on after an interruption.

`.OUT.incomplete` stands beside OUT and holds `lock`, `manifest.json`, finished shards, perhaps the `profile.json` they
were planned by, and `model/`, which becomes OUT by one rename. The manifest says what the work was made from (its key)
and lists the shards that are whole; it is replaced by rename, after the shard is on disk. So whenever a run is killed,
the next one finds either a shard and its record or neither, and OUT exists only when it is complete.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from isal import isal_zlib

from ..errors import CheckpointError

Say = Callable[[str], None]

# The manifest, and the profile that formats were chosen by (resume.py).
MANIFEST, PROFILE = "manifest.json", "profile.json"

_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard that is whole.

    Attributes:
        crc32: of the file.
        nbytes: of its tensors.
        tensors: their names.
        results: names of the source's stream (Source.weights) that it stands for.
        lines: what became of their projections, as report.Line's fields.
        changed: how many of them options changed, by what was done.
    """

    crc32: int
    nbytes: int
    tensors: list[str]
    results: list[str]
    lines: list[list[Any]]
    changed: dict[str, int]


def folder_of(target: Path) -> Path:
    """Where OUT is worked on."""
    return target.with_name(f".{target.name}.incomplete")


def key_of(folder: Path) -> Any:
    """The key of an interrupted run's work; None where none can be read."""
    try:
        return json.loads((folder / MANIFEST).read_text())["key"]
    except (ValueError, KeyError, TypeError, OSError):
        return None


class WorkFolder:
    """The folder, held by this process until `close`.

    Attributes:
        target: OUT.
        model: what becomes OUT.
        shards: those that are whole, in their order.
    """

    def __init__(self, target: Path, key: Mapping[str, Any], say: Say) -> None:
        """Lock the folder and find out what of it can be used.

        Args:
            target: OUT.
            key: JSON values that decide every byte of the result; work under another key is thrown away.
            say: told in one line when work is taken up or thrown away.

        Raises:
            CheckpointError: another run is writing OUT, or has finished it.
        """
        self.target, self.key = target, json.loads(json.dumps(key))
        self.folder = folder_of(target)
        self.model = self.folder / "model"
        self.shards: list[Shard] = []
        self._lock = self._acquire()
        try:
            if target.exists():
                raise CheckpointError(f"{target}: exists already; remove it or choose another name")
            if (self.folder / MANIFEST).exists():
                self._take_up(say)
            self._tidy()
            self._write_manifest()
        except BaseException:
            self.close()
            raise

    def _acquire(self) -> int:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise CheckpointError(
                    f"{self.target}: another run is writing it now; wait for it, or choose another name"
                ) from None
            try:  # the run that held it may have removed the folder meanwhile
                if os.path.samestat(os.fstat(lock), os.stat(self.folder / "lock")):
                    return lock
            except FileNotFoundError:
                pass
            os.close(lock)

    def _take_up(self, say: Say) -> None:
        """Fill `shards` with those of an interrupted run that are whole and were made from the same."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text())
            key = manifest["key"]
            shards = [Shard(**shard) for shard in manifest["shards"]]
        except (ValueError, KeyError, TypeError, OSError):
            say(f"{self.target}: the manifest of an interrupted run is damaged; starting over")
            return
        if key != self.key:
            names = [k for k in self.key if not isinstance(key, dict) or key.get(k) != self.key[k]]
            say(f"{self.target}: an interrupted run was another one ({', '.join(names)} differ); starting over")
            return
        for number, shard in enumerate(shards, 1):
            found = next((p for p in self._names(number) if p.is_file() and file_crc32(p) == shard.crc32), None)
            if found is None:
                say(f"{self.target}: shard {number} of an interrupted run is damaged; going on from the one before it")
                break
            if found != self.path(number):
                found.rename(self.path(number))
            self.shards.append(shard)
        if self.shards:
            count = sum(len(shard.results) for shard in self.shards)
            say(f"{self.target}: taking up an interrupted run, {count} tensors are done")

    def _names(self, number: int) -> list[Path]:
        """Where a shard may be: the run may have been killed while it named them."""
        final = sorted(self.model.glob(f"model-{number:05d}-of-*.safetensors"))
        return [self.path(number), *final, *([self.model / "model.safetensors"] if number == 1 else [])]

    def _tidy(self) -> None:
        """Remove all that is not the lock, a shard that is whole or its run's profile; make an empty `model`."""
        kept = {"lock", PROFILE, *(self.path(i).name for i in range(1, len(self.shards) + 1))}
        for entry in self.folder.iterdir():
            if entry.name not in kept:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.model.mkdir(mode=0o755)

    def path(self, number: int) -> Path:
        """Of shard `number`, from 1, until it gets its final name."""
        return self.folder / f"shard-{number}.safetensors"

    def results(self) -> set[str]:
        """Names of the source's stream that are in finished shards."""
        return {name for shard in self.shards for name in shard.results}

    def add(self, path: Path, **record: Any) -> None:
        """Take the file `path`, which is on disk, as the next shard."""
        crc32 = file_crc32(path)
        path.rename(self.path(len(self.shards) + 1))
        self.shards.append(Shard(crc32=crc32, **record))
        self._write_manifest()

    def _write_manifest(self) -> None:
        data = {"key": self.key, "shards": [dataclasses.asdict(shard) for shard in self.shards]}
        path = self.folder / "manifest.json.new"
        path.write_text(json.dumps(data))
        sync(path)
        path.rename(self.folder / MANIFEST)
        sync(self.folder)

    def publish(self) -> None:
        """`model` becomes OUT, and the rest is removed."""
        sync(self.model)
        self.model.rename(self.target)
        sync(self.target.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the folder; nothing can be taken up."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let the next run have the folder; one without shards is not worth keeping."""
        if not self.shards:
            self.discard()
        os.close(self._lock)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = isal_zlib.crc32(chunk, crc)
    return crc
