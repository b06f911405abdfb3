"""Launch settings by GPU model: a family's defaults, unless settings measured on this model are kept.

They are a JSON file per model: `tuned/MODEL.json` beside this file for cards that were measured, or what
`benchmarks/gpu.py --tune` wrote to the user's cache, which counts first. A file is read once per card, when a family
first runs there. Nothing is measured while a model runs, so nothing is under graph capture. Settings change how long a
kernel takes and in which order it adds, not what it computes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import json
import operator
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ...errors import OptionError
from ...files import cache_folder, write_text
from .common import Launch

FAMILIES = ("nm", "sell", "ternary", "block")
SHIPPED = Path(__file__).parent / "tuned"
VERSION = 1

# (kernel, tokens or rows of a program), as in LAUNCHES of every family.
Key = tuple[str, int]
Launches = Mapping[Key, Launch]

# Settings in place of any file, by family and key: what `trying` puts there.
_tried: dict[tuple[str, Key], Launch] = {}


def launches(device: torch.device, family: str) -> Launches:
    """The settings of a family on a device.

    Raises:
        OptionError: there is a file for this card, and it is damaged.
    """
    found = _launches(device, family)
    if _tried:
        return {**found, **{key: launch for (name, key), launch in _tried.items() if name == family}}
    return found


@functools.cache
def _launches(device: torch.device, family: str) -> Launches:
    if device.type != "cuda":  # interpreted
        return defaults(family)
    file = file_of(torch.cuda.get_device_name(device))
    return defaults(family) if file is None else load(file)[family]


def defaults(family: str) -> Launches:
    """Of a family's own file."""
    found: Launches = importlib.import_module(f".{family}", __package__).LAUNCHES
    return found


def grid(family: str, key: Key) -> Iterator[Launch]:
    """All settings worth measuring for one kernel."""
    module = importlib.import_module(f".{family}", __package__)
    groups, unrolls, warps = module.GRID[key[0]]
    for g, u, w in itertools.product(groups, unrolls, warps):
        if g * u <= module.MOST_STEPS:
            yield Launch(groups=g, unroll=u, num_warps=w)


def slug(card: str) -> str:
    """A card's name as that of its file."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def user_file(card: str) -> Path:
    """Where `--tune` keeps a card's settings."""
    return cache_folder() / f"gpu-{slug(card)}.json"


def file_of(card: str) -> Path | None:
    """The file that counts for a card, if there is one."""
    return next((f for f in (user_file(card), SHIPPED / f"{slug(card)}.json") if f.is_file()), None)


def save(path: Path, card: str, settings: Mapping[str, Launches]) -> None:
    """Write settings of all families; the file appears only when it is whole."""
    kernels = {
        f"{family}/{kernel}/{rows}": [launch.groups, launch.unroll, launch.num_warps]
        for family, chosen in settings.items()
        for (kernel, rows), launch in chosen.items()
        if kernel != "decompress"  # most of whose time is the product's
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"version": VERSION, "card": card, "kernels": kernels}, indent=1) + "\n")


def load(path: Path) -> dict[str, Launches]:
    """Settings of all families; what a file does not name are defaults.

    Raises:
        OptionError: it is damaged, of another version, or names settings that no kernel has.
    """
    found: dict[str, dict[Key, Launch]] = {family: dict(defaults(family)) for family in FAMILIES}
    try:
        data = json.loads(path.read_text())
        if data["version"] != VERSION:
            raise ValueError("it is of another version")
        for name, setting in data["kernels"].items():
            family, kernel, rows = name.split("/")
            key, launch = (kernel, int(rows)), Launch(*map(operator.index, setting))
            if family not in FAMILIES:
                raise ValueError(f"there is no family {family}")
            if launch not in (*grid(family, key), defaults(family)[key]):
                raise ValueError(f"{name} has no setting {setting}")
            found[family][key] = launch
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(
            f"{path}: holds no launch settings ({error}); remove it, or measure again: benchmarks/gpu.py --tune"
        ) from None
    return dict(found)


@contextlib.contextmanager
def trying(family: str, key: Key, launch: Launch) -> Iterator[None]:
    """Kernels of a family run with other settings meanwhile; for measuring them."""
    _tried[family, key] = launch
    try:
        yield
    finally:
        del _tried[family, key]
