"""Options from a file: YAML or JSON, with the keys options have everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ..errors import OptionError
from ..options import Options


def read(path: Path) -> dict[str, Any]:
    """The options a recipe names; every key and value is known and possible.

    Args:
        path: JSON if it begins with `{`, else YAML; one mapping.

    Raises:
        OptionError: naming the file, and what of it is wrong.
    """
    try:
        text = path.read_text()
        data = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"recipe {path}: cannot be read: {error}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise OptionError(f"recipe {path}: is neither JSON nor YAML: {' '.join(str(error).split())}") from None
    if data is None:
        data = {}  # nothing but comments
    if not isinstance(data, dict):
        raise OptionError(f"recipe {path}: must be one mapping of options, such as 'sparsity: 0.5'; got {data!r}")
    try:
        Options.from_dict(data)
    except OptionError as error:
        raise OptionError(f"recipe {path}: {error}") from None
    return {key: value for key, value in data.items() if key != "quant_method"}
