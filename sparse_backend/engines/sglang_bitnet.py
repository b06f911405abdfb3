"""BitNetForCausalLM for SGLang (microsoft/bitnet-b1.58-2B-4T; transformers' modeling_bitnet.py).

A Llama with a squared-ReLU gate and an RMSNorm before each of `o_proj` and `down_proj`: SGLang's own Llama, in
which two modules are wrapped. Written against sglang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.runtime_context import get_parallel
from torch import nn

from ..kernels import cpu


class SubNorm(nn.Module):
    """RMSNorm over features of which this rank holds a part: x [..., size / ranks]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        parallel = get_parallel()
        self.size, self.eps, self.ranks, self.rank = size, eps, parallel.tp_size, parallel.tp_rank
        self.weight = nn.Parameter(torch.ones(size // self.ranks), requires_grad=False)
        setattr(self.weight, "weight_loader", self._load)  # noqa: B010 - SGLang's own mark

    def _load(self, param: nn.Parameter, loaded: torch.Tensor) -> None:
        part = param.shape[0]
        param.data.copy_(loaded.narrow(0, self.rank * part, part))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As transformers: normalised in float32, rounded, times the weight."""
        if self.ranks == 1 and x.device.type == "cpu":
            y: torch.Tensor = cpu.ops().rms_norm(x, self.weight, self.eps, True)
            return y
        full = x.float()
        squares = full.pow(2).sum(-1, keepdim=True)
        if self.ranks > 1:
            squares = get_parallel().tp_group.all_reduce(squares)
        return self.weight * (full * torch.rsqrt(squares / self.size + self.eps)).to(x.dtype)


class NormedAttention(nn.Module):
    """Attention, then the norm before `o_proj`."""

    def __init__(self, attention: nn.Module, norm: SubNorm) -> None:
        super().__init__()
        self.attention, self.sub_norm = attention, norm

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[T, heads * head_dim]."""
        y: torch.Tensor = self.sub_norm(self.attention(*args, **kwargs))
        return y


class SquaredReluGate(nn.Module):
    """relu(gate)^2 * up, then the norm before `down_proj`."""

    def __init__(self, norm: SubNorm) -> None:
        super().__init__()
        self.sub_norm = norm

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[..., 2 N] to [..., N]."""
        gate, up = gate_up.chunk(2, dim=-1)
        y: torch.Tensor = self.sub_norm(torch.relu(gate).square() * up)
        return y


class BitNetForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """The model; loaded, scheduled and sharded as SGLang's Llama is."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        if config.hidden_act != "relu2":
            raise ValueError(f"BitNet's activation is relu2, config.json says hidden_act = {config.hidden_act!r}")
        config.hidden_act = "silu"  # Llama's MLP, whose activation is replaced below, knows no other
        try:
            super().__init__(config, quant_config, prefix)
        finally:
            config.hidden_act = "relu2"
        for layer in self.model.layers:
            layer.self_attn.attn = NormedAttention(
                layer.self_attn.attn, SubNorm(config.hidden_size, config.rms_norm_eps)
            )
            layer.mlp.act_fn = SquaredReluGate(SubNorm(config.intermediate_size, config.rms_norm_eps))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """HF names; the norms are where the modules above have them."""
        names = {".attn_sub_norm.": ".attn.sub_norm.", ".ffn_sub_norm.": ".act_fn.sub_norm."}

        def renamed() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                for theirs, ours in names.items():
                    name = name.replace(theirs, ours)
                yield name, tensor

        return super().load_weights(renamed())
