"""Checkpoints that llm-compressor pruned: their config.json may say so, and is no reason to refuse them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import CheckpointError

METHOD = "compressed-tensors"
_PLAIN_FORMATS = (None, "dense", "sparse-bitmask", "sparse-24-bitmask")
# What the sparse formats store instead of `<module>.weight`.
_COMPRESSED = (".compressed", ".bitmask")


def is_only_pruned(quantization: Any, folder: object, tensors: Iterable[str]) -> bool:
    """Whether a `quantization_config` is compressed-tensors' and quantises nothing: weights are taken as they are.

    Args:
        quantization: config.json's entry.
        folder: of the checkpoint, for messages.
        tensors: names of its tensors.

    Raises:
        CheckpointError: its weights are pruned, and stored in compressed-tensors' own sparse format.
    """
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != METHOD:
        return False
    groups = quantization.get("config_groups") or {}
    schemes = ("weights", "input_activations", "output_activations")
    if any(isinstance(group, Mapping) and any(group.get(s) for s in schemes) for group in groups.values()):
        return False
    if quantization.get("kv_cache_scheme") or (quantization.get("transform_config") or {}).get("config_groups"):
        return False
    if quantization.get("format") not in _PLAIN_FORMATS:
        return False
    compressed = next((name for name in tensors if name.endswith(_COMPRESSED)), None)
    if compressed is not None:
        format = (quantization.get("sparsity_config") or {}).get("format") or quantization.get("format")
        raise CheckpointError(
            f"{folder}: holds {compressed}: its weights are stored compressed ({METHOD}, {format}); save the model "
            "again with save_pretrained(..., save_compressed=False)"
        )
    return True
