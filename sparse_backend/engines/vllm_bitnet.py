"""BitNetForCausalLM for vLLM (microsoft/bitnet-b1.58-2B-4T; transformers' modeling_bitnet.py).

A Llama with a squared-ReLU gate and an RMSNorm before each of `o_proj` and `down_proj`. Those two
normalise what tensor parallelism has cut: the ranks add up their sums of squares.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP, LlamaModel
from vllm.model_executor.utils import set_weight_attrs


class SubNorm(nn.Module):
    """RMSNorm over features of which this rank holds a part: x [..., size / ranks]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.ranks = get_tensor_model_parallel_world_size()
        self.weight = nn.Parameter(torch.ones(size // self.ranks), requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": self._load})

    @staticmethod
    def _load(param: nn.Parameter, loaded: torch.Tensor) -> None:
        part = param.shape[0]
        param.data.copy_(loaded.narrow(0, get_tensor_model_parallel_rank() * part, part))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        full = x.float()
        squares = full.pow(2).sum(-1, keepdim=True)
        if self.ranks > 1:
            squares = tensor_model_parallel_all_reduce(squares)
        return self.weight * (full * torch.rsqrt(squares / self.size + self.eps)).to(x.dtype)


class BitNetAttention(LlamaAttention):  # type: ignore[misc]
    """Llama's attention with a norm before `o_proj`."""

    def __init__(self, config: Any, hidden_size: int, **kwargs: Any) -> None:
        super().__init__(config=config, hidden_size=hidden_size, **kwargs)
        self.attn_sub_norm = SubNorm(hidden_size, config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output: torch.Tensor = self.o_proj(self.attn_sub_norm(self.attn(q, k, v)))[0]
        return output


class BitNetMLP(LlamaMLP):  # type: ignore[misc]
    """relu(gate)^2 * up, a norm, `down_proj`."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        if config.hidden_act != "relu2":
            raise ValueError(f"BitNet's activation is relu2, config.json says hidden_act = {config.hidden_act!r}")
        super().__init__(config.hidden_size, config.intermediate_size, "silu", **kwargs)
        self.ffn_sub_norm = SubNorm(config.intermediate_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x)
        gate, up = gate_up.chunk(2, dim=-1)
        output: torch.Tensor = self.down_proj(self.ffn_sub_norm(torch.relu(gate).square() * up))[0]
        return output


class BitNetDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """Llama's layer with the attention and MLP above."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        config = config or vllm_config.model_config.hf_config
        activation, config.hidden_act = config.hidden_act, "silu"  # Llama's MLP, replaced below, knows no other
        try:
            super().__init__(vllm_config, prefix, config, attn_layer_type=BitNetAttention)
        finally:
            config.hidden_act = activation
        self.mlp = BitNetMLP(config, quant_config=self.get_quant_config(vllm_config), prefix=f"{prefix}.mlp")


class BitNetForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """The model; loaded, scheduled and sharded as vLLM's Llama is."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=BitNetDecoderLayer)

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = BitNetDecoderLayer
    ) -> LlamaModel:
        return LlamaModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
