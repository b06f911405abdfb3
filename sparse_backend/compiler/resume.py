"""The profile a compile plans by: of an interrupted run that it goes on from, else this machine's.

On a busy machine a profile is measured anew by every process (calibrate.py does not keep it), and each one differs. The
work folder keeps the one its run planned by, so that the next run goes on, to the bytes the first would have made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import envs
from ..errors import OptionError
from . import calibrate
from .cost import Profile
from .work import PROFILE, key_of

MACHINE = "machine"


def digest(profile: Profile) -> str:
    """Of everything it says."""
    return hashlib.sha256(json.dumps(profile.to_json(), sort_keys=True).encode()).hexdigest()


def machine_key() -> str | None:
    """What a measured profile is of; None where SPARSE_BACKEND_PROFILE names one."""
    return calibrate.fingerprint() if envs.profile() is None else None


def profile_for(folder: Path, key: Mapping[str, Any]) -> Profile:
    """The profile to plan by.

    Args:
        folder: where an interrupted run may have worked.
        key: of this run, but for its profile.
    """
    before = key_of(folder)
    if envs.profile() is None and isinstance(before, dict):
        machine = before.pop(MACHINE, None)
        if before == json.loads(json.dumps(key)):
            with contextlib.suppress(OptionError):  # no profile there
                kept = Profile.load(folder / PROFILE)
                if digest(kept) == machine:
                    return kept
    return calibrate.current_profile()


@contextlib.contextmanager
def planning_by(profile: Profile | None, folder: Path) -> Iterator[None]:
    """Keep a profile in the work folder, and have every plan of this process go by it meanwhile; None does nothing."""
    if profile is None or envs.profile() is not None:
        yield
        return
    calibrate.save(profile, folder / PROFILE)
    with calibrate.using(profile):
        yield
