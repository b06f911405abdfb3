"""What the projections of one decode step take by themselves: the part of an engine's step that is kernels.

Measured in the engine's own process, between its runs: on a machine whose memory changes speed within minutes
only times of the same moment can be subtracted.
"""

from __future__ import annotations

from typing import Any

import torch
from contest import Contender, dense_peers, fastest, measure
from sparse_kernels import DENSE, machine_contender

from sparse_backend import Options
from sparse_backend.compiler import plan


class StepKernels:
    """The products of a random Llama's layers, as an engine fuses them.

    Args:
        config: of the model (random_models.py).
        zeros: share of zeros.
        values: of sparse weights; None for bf16.
        dense: the engine's own product instead of ours.
    """

    def __init__(self, config: dict[str, Any], zeros: float, values: str | None, dense: bool) -> None:
        hidden, head = config["hidden_size"], config["head_dim"]
        heads, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
        shapes = (
            (heads + 2 * kv, hidden), (hidden, heads), (2 * config["intermediate_size"], hidden),
            (hidden, config["intermediate_size"]),
        )  # fmt: skip
        self.layers = config["num_hidden_layers"]
        generator = torch.Generator().manual_seed(0)
        self.groups: list[list[Contender]] = []
        for n, k in shapes:
            weight = torch.randn(n, k, generator=generator)
            weight = weight.masked_fill_(torch.rand(n, k, generator=generator) < zeros, 0).bfloat16()
            packed = None if dense else plan.pack(weight, Options(values=values))[0]
            if packed is None:
                self.groups.append(dense_peers(weight))
            else:
                self.groups.append([machine_contender(packed.format, packed.lower())])
        self.columns = [k for _, k in shapes]

    def seconds(self, batch: int) -> float:
        """Of all projections of one step of `batch` tokens: medians, the faster of the dense products."""
        total = 0.0
        for group, k in zip(self.groups, self.columns, strict=True):
            x = torch.randn(batch, k, generator=torch.Generator().manual_seed(1)).bfloat16()
            measure(group, x, 0.15)
            total += self.layers * (fastest(group, DENSE) if len(group) > 1 else group[0].seconds)
        return total
