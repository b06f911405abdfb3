"""`sparse-backend patch`: add what an older engine lacks, whole or not at all.

A diff is applied only to a file that is, byte for byte, the one its wheel installed, so taking it
out again gives those bytes back.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from unidiff.patch import (
    Hunk,
    PatchSet,
)  # only parses: whatthepatch and unipatch apply, but at fixed lines or with fuzz

from .errors import OptionError, SparseBackendError


class PatchError(SparseBackendError):
    """An installed engine cannot be patched; nothing was changed unless the message says so."""


@dataclasses.dataclass(frozen=True)
class Patch:
    """One diff. `versions` as in PEP 440; `fits` says the same to a reader, and which versions need no patch."""

    engine: str
    versions: str
    diff: str
    upstream: str
    gives: str
    fits: str


PATCHES = (
    Patch(
        engine="sglang",
        versions=">=0.5.2,<0.5.11",
        diff="sglang-0.5.2-0.5.10-plugins.diff",
        upstream="https://github.com/sgl-project/sglang/pull/21388",
        gives="plugins (entry points sglang.srt.plugins) are loaded in every process; "
        "HookRegistry, which sparse-compiled uses, needs SGLang 0.5.11 or later",
        fits="the releases 0.5.2 to 0.5.10.post1; 0.5.11 and later load plugins by themselves and need no patch",
    ),
)


@dataclasses.dataclass(frozen=True)
class Change:
    """One file: what is there and what shall be, None where there is no file."""

    name: str
    file: Path
    before: bytes | None
    after: bytes | None

    @property
    def verb(self) -> str:
        """What happens to the file, for the report."""
        return "add" if self.before is None else "remove" if self.after is None else "change"


@dataclasses.dataclass(frozen=True)
class Report:
    """What `patch_engine` found and did; no changes if everything was as asked already."""

    patch: Patch
    version: str
    folder: Path
    changes: tuple[Change, ...]


def patch_engine(
    engine: str, reverse: bool = False, dry_run: bool = False, site_packages: Path | None = None
) -> Report:
    """Apply the engine's patch, or take it out; only report with `dry_run`.

    Every change is worked out before the first file is written, and files already written are put
    back if a later one fails.

    Raises:
        OptionError: no patch is for this engine, or `site_packages` is no folder.
        PatchError: the engine is not installed, its version unknown, a file not the wheel's, or not writable.
    """
    engines = sorted({p.engine for p in PATCHES})
    if engine not in engines:
        raise OptionError(f"no patch is for {engine!r}; allowed: {', '.join(engines)}")
    installed = _installed(engine, site_packages)
    patch = _select(engine, installed.version)
    folder = Path(str(installed.locate_file("")))
    changes = _plan(patch, installed, folder, reverse)
    if not dry_run:
        _write(changes)
    return Report(patch, installed.version, folder, changes)


def _installed(engine: str, site_packages: Path | None) -> importlib.metadata.Distribution:
    if site_packages is not None and not site_packages.is_dir():
        raise OptionError(f"--site-packages {site_packages}: no such folder")
    path = sys.path if site_packages is None else [str(site_packages)]
    found = next(iter(importlib.metadata.distributions(name=engine, path=path)), None)
    if found is None:
        where = site_packages or "this environment"
        raise PatchError(f"no {engine} in {where}; name the folder it is installed in: --site-packages DIR")
    return found


def _select(engine: str, version: str) -> Patch:
    rows = [p for p in PATCHES if p.engine == engine]
    for patch in rows:
        try:
            # No pre-release was tried.
            if SpecifierSet(patch.versions).contains(Version(version), prereleases=False):
                return patch
        except InvalidVersion:
            break
    raise PatchError(
        f"no patch is for {engine} {version}; there is one for {', and one for '.join(p.fits for p in rows)}"
    )


def _plan(patch: Patch, installed: importlib.metadata.Distribution, folder: Path, reverse: bool) -> tuple[Change, ...]:
    """The changes that are still to be made, in the order in which no moment breaks the engine."""
    recorded = {str(f): f.hash.value for f in installed.files or () if f.hash and f.hash.mode == "sha256"}
    changes = []
    for part in PatchSet.from_filename(str(Path(__file__).parent / "patches" / patch.diff), encoding="utf-8"):
        file = folder / part.path
        before = file.read_bytes() if file.is_file() else None
        original: bytes | None
        patched: bytes | None
        if part.is_added_file:
            original, patched = None, _rewritten(b"", part)
            known = before in (original, patched)
        else:
            # Either the wheel's file, or what becomes the wheel's file again.
            original = before if _is_recorded(before, recorded.get(part.path)) else _rewritten(before, part, True)
            known = _is_recorded(original, recorded.get(part.path))
            patched = _rewritten(original, part)
        if not known or patched is None:
            raise PatchError(
                f"{file} is not as in {patch.engine} {installed.version}'s wheel, so nothing was changed; to get the "
                f"wheel's: pip install --force-reinstall --no-deps {patch.engine}=={installed.version}"
            )
        after = original if reverse else patched
        if before != after:
            changes.append(Change(part.path, file, before, after))
    # The diff adds modules before it changes those that import them.
    return tuple(reversed(changes) if reverse else changes)


def _is_recorded(content: bytes | None, recorded: str | None) -> bool:
    if content is None or recorded is None:
        return False
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode() == recorded


def _rewritten(content: bytes | None, hunks: Iterable[Hunk], reverse: bool = False) -> bytes | None:
    """`content` with all hunks applied, or None: each has to match whole lines, exactly, in one place only."""
    if content is None:
        return None
    text = b"\n" + content
    for hunk in hunks:
        old, new = (
            b"\n" + "".join(line.value for line in lines).encode()
            for lines in (hunk.source_lines(), hunk.target_lines())
        )
        if reverse:
            old, new = new, old
        if text.count(old) != 1:
            return None
        text = text.replace(old, new)
    return text[1:]


def _write(changes: tuple[Change, ...]) -> None:
    done: list[Change] = []
    try:
        for change in changes:
            _put(change.file, change.after)
            done.append(change)
    except BaseException as error:
        for earlier in reversed(done):
            _put(earlier.file, earlier.before)
        if isinstance(error, OSError):
            raise PatchError(f"cannot {change.verb} {change.file}: {error.strerror}; nothing was changed") from error
        raise


def _put(file: Path, content: bytes | None) -> None:
    """Give `file` this content at once. The file is replaced, not written into: it may be a hard link to a cache."""
    if content is None:
        file.unlink()
        return
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as f:
            f.write(content)
        if file.exists():
            shutil.copymode(file, part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
