"""Entry point of the vLLM plugin; the adapter itself is vllm_classes.py.

Apart so that vLLM is imported only when vLLM calls: an error in that import then stops the
engine with its reason, instead of surfacing later as an unknown quantization method.
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM know `--quantization sparse-compiled`. May be called any number of times."""
    from . import vllm_classes

    vllm_classes.register()
