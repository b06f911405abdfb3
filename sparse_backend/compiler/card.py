"""The model card of a compiled checkpoint: README.md with the front matter that Hugging Face reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..options import QUANT_METHOD, Options
from ..report import Report, human_bytes
from . import checkpoint
from .writer import CARD, SOURCE_CARD

# What a source's card says that is as true of the result.
_COPIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write(info: checkpoint.Checkpoint, options: Options, layout: str, report: Report, command: str, name: str) -> str:
    """The text of README.md.

    Args:
        info: the source.
        options: what was done.
        layout: `sparse-compiled` or `bitnet`.
        report: what became of every projection.
        command: what made the result.
        name: of the result's folder.
    """
    base = hub_name(info)
    origin = base or info.folder.absolute().name
    has_card = any((info.folder / card).is_file() for card in (CARD, SOURCE_CARD))
    link = f"; its own card is [{SOURCE_CARD}]({SOURCE_CARD})" if has_card else ""
    parts = [
        "---\n" + yaml.safe_dump(_front_matter(info, base, layout, report), sort_keys=False) + "---",
        f"# {name}",
        f"Made from `{origin}`{link}, by sparse_backend {__version__}.",
        _difference(options, report),
        "## What it holds\n" + _plan(report),
        f"## How it was made\n```\n{command}\n```\nOptions: `{json.dumps(_plain(options))}`",
        "## How to run it\n" + _usage(name, layout),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(info: checkpoint.Checkpoint, base: str | None, layout: str, report: Report) -> dict[str, Any]:
    source = read_front_matter(info.folder)
    matter = {key: source[key] for key in _COPIED if key in source}
    if base is not None:
        matter |= {"base_model": base, "base_model_relation": "quantized"}
    matter["library_name"] = "sparse_backend" if layout == QUANT_METHOD else "transformers"
    formats = [f for f in report.by_format() if f != "dense"]
    changes = [word for word in ("pruned", "rounded") if any(word in what for what in report.changed)]
    matter["tags"] = list(dict.fromkeys([layout, *formats, *changes]))
    return matter


def read_front_matter(folder: Path) -> dict[str, Any]:
    """The front matter of a checkpoint's card; empty if there is none that is a YAML mapping."""
    for name in (SOURCE_CARD, CARD):
        path = folder / name
        if not path.is_file():
            continue
        found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", path.read_text(errors="replace"), re.DOTALL)
        try:
            data = yaml.safe_load(found[1]) if found else None
        except yaml.YAMLError:
            data = None
        return data if isinstance(data, dict) else {}
    return {}


def hub_name(info: checkpoint.Checkpoint) -> str | None:
    """`owner/name` of a checkpoint that lies in Hugging Face's cache, or names itself so in config.json; else None."""
    for part in info.folder.absolute().parts:
        if part.startswith("models--") and part.count("--") >= 2:
            return part.removeprefix("models--").replace("--", "/", 1)
    named = info.config.get("_name_or_path")
    return named if isinstance(named, str) and _HUB_NAME.fullmatch(named) and not Path(named).exists() else None


def _difference(options: Options, report: Report) -> str:
    lines = [f"- {count} projections were {what}." for what, count in report.changed.items()]
    if options.lm_head != "keep":
        lines.append(f"- Engines round the output head to {options.lm_head} as they load it.")
    if not lines:
        return "No weight was changed: it computes what the original computes."
    asked = {k: v for k, v in _plain(options).items() if k in ("sparsity", "method", "pattern", "allocation")}
    if any("pruned" in what for what in report.changed):
        asked = {"method": options.method, "pattern": options.pattern, **asked}
        lines.append("- Pruning: " + ", ".join(f"{k} {v}" for k, v in asked.items()) + ".")
    return "**This model differs from the original:**\n\n" + "\n".join(lines)


def _plain(options: Options) -> dict[str, Any]:
    return {k: v for k, v in options.to_dict().items() if k != "quant_method"}


def _plan(report: Report) -> str:
    rows = ["| format | projections | before | after | |", "|---|---|---|---|---|"]
    for name, (count, before, after) in report.by_format().items():
        rows.append(
            f"| {name} | {count} | {human_bytes(before)} | {human_bytes(after)} | {after / max(before, 1):.0%} |"
        )
    reasons = [f"Dense: {count} x {reason}." for reason, count in report.dense_reasons().items()]
    return "\n".join([*rows, "", f"All tensors: {human_bytes(report.total_bytes)}.", *reasons])


def _usage(name: str, layout: str) -> str:
    if layout != QUANT_METHOD:
        return "This is Hugging Face's packing of BitNet layers: transformers reads it, and sparse_backend serves it."
    return (
        "With [vLLM](https://docs.vllm.ai) or SGLang and sparse_backend installed, no flag is needed:\n"
        f"```\nsparse-backend serve ./{name}\nvllm serve ./{name}\n"
        f"python -m sglang.launch_server --model-path ./{name}\n```\n"
        "With transformers:\n"
        "```python\nimport sparse_backend.engines.transformers\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("./{name}")\n```'
    )
