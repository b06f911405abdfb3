"""`bitmask`: one bit per weight says whether it is stored; stored weights follow row by row.

Lossless for any zero pattern. Size: N * ceil(K / 8) + 2 * nnz bytes, so it pays from about
one zero in sixteen. The bitmap-plus-values layout is that of SpInfer (Fan et al., EuroSys
2025) and SparAMX (AbouElhamayed et al., 2025); the machine form is our own, see
csrc/bitmask/layout.h.
"""

from __future__ import annotations

from typing import Any

import torch

from ..options import GROUP_SIZES
from .unstructured import Unstructured


class Bitmask(Unstructured):
    """Kernels that work per position: for weights with up to about 75% zeros."""

    name = "bitmask"
    group_sizes = GROUP_SIZES["bitmask"]
    coded = False

    def _lower(self, *args: Any) -> torch.Tensor:
        from ..kernels import cpu

        buffer: torch.Tensor = cpu.ops().bitmask_lower(*args)
        return buffer
