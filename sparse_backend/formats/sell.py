"""`sell`: sorted row slices, whose kernels work per stored weight and not per position.

Lossless for any zero pattern, and the same canonical form as `bitmask`; pays from about 75%
zeros. After SELL-C-sigma (Kreutzer et al., 2014), without its padding: see csrc/sell/layout.h.
Machine form of bf16 values: 20 bits per weight stored and about 1.3 bytes per row and 128 columns.
"""

from __future__ import annotations

from typing import Any

import torch

from ..options import GROUP_SIZES
from .unstructured import Unstructured


class Sell(Unstructured):
    """Kernels that work per stored weight."""

    name = "sell"
    group_sizes = GROUP_SIZES["sell"]
    coded = True

    def _lower(self, *args: Any) -> torch.Tensor:
        from ..kernels import cpu

        buffer: torch.Tensor = cpu.ops().sell_lower(*args)
        return buffer
