"""Layer shapes (N, K) of real models."""

from __future__ import annotations

SHAPES: dict[str, tuple[int, int]] = {
    "qwen3.5-27b gate/up": (17408, 5120),
    "qwen3.5-27b down": (5120, 17408),
    "llama3-8b gate/up": (14336, 4096),
    "llama3-8b down": (4096, 14336),
    "llama3-8b o": (4096, 4096),
    "bitnet-2b gate/up": (6912, 2560),
    "bitnet-2b down": (2560, 6912),
    "bitnet-2b lm_head": (128256, 2560),
}
