"""What the platform `sparse_cpu` runs in place of SGLang's torch-native code: our ops of csrc/layers.

Written against sglang 0.5.23. Where an op does not know a case (cross attention, norms over a part of
their input), SGLang's own code runs as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from ..kernels import cpu
from .sglang_cpu_limits import NAME

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def _op(name: str) -> Callable[..., Any]:
    """An op of ours; resolved once, because torch.ops looks its overloads up at every call."""
    return cast(Callable[..., Any], getattr(cpu.ops(), name).default)


class PagedAttention(TorchNativeAttnBackend):  # type: ignore[misc]
    """Attention straight from the paged cache; torch-native gathers K and V of every request first."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Once per step: what all layers need to know of the batch."""
        super().init_forward_metadata(forward_batch)
        self.rows = forward_batch.req_pool_indices.long()
        self.lengths = forward_batch.seq_lens.long()
        extend = forward_batch.extend_seq_lens
        decodes = forward_batch.forward_mode.is_decode_or_idle()
        self.new_tokens = None if decodes or extend is None else extend.long()

    def _attend(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool) -> torch.Tensor:
        if save_kv_cache and k is not None and v is not None:
            location = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, location, k, v)
        window = -1 if layer.sliding_window_size is None else layer.sliding_window_size
        causal = layer.attn_type != AttentionType.ENCODER_ONLY
        y: torch.Tensor = _op("paged_attention")(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            self.rows, self.lengths, self.new_tokens, layer.scaling,
            window if causal else -1, layer.logit_cap or 0.0, causal,
        )  # fmt: skip
        return y.view(y.shape[0], -1)

    def _ours(self, layer: Any, forward_batch: Any) -> bool:
        return not layer.is_cross_attention and forward_batch.encoder_lens is None

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """Prompts, or chunks of them; q [T, H * D]."""
        run = self._attend if self._ours(layer, forward_batch) else super().forward_extend
        return cast(torch.Tensor, run(q, k, v, layer, forward_batch, save_kv_cache))

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """One new token of each request; q [S, H * D]."""
        run = self._attend if self._ours(layer, forward_batch) else super().forward_decode
        return cast(torch.Tensor, run(q, k, v, layer, forward_batch, save_kv_cache))


def _rms_norm(
    self: Any, x: torch.Tensor, residual: Any = None, post_residual_addition: Any = None, quant_linear: Any = None
) -> Any:
    plain = (
        self.variance_size_override is None and not self.fp32_residual and post_residual_addition is None
        and self.override_orig_dtype in (None, x.dtype) and x.dtype in _DTYPES and x.shape[-1] == self.hidden_size
    )  # fmt: skip
    if not plain:
        return self.forward_native(x, residual, post_residual_addition, quant_linear)
    early = self.cast_x_before_out_mul
    if residual is None:
        return _op("rms_norm")(x, self.weight, self.variance_epsilon, early)
    return _op("add_rms_norm")(x, residual.to(x.dtype), self.weight, self.variance_epsilon, early)


def _silu_and_mul(self: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = _op("silu_and_mul")(x)
    return y


def _rotate(
    self: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: Any = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    two = query.dim() == 2 and key.dim() == 2 and query.stride(1) == 1 and key.stride(1) == 1
    if not two or offsets is not None or fused_set_kv_buffer_arg is not None or hasattr(self, "sin_cos_cache"):
        native: tuple[torch.Tensor, torch.Tensor] = self.forward_native(
            positions, query, key, offsets, fused_set_kv_buffer_arg
        )
        return native
    table = self.cos_sin_cache_as(torch.float32)
    positions = positions.flatten().long()
    for x in (query, key):
        _op("rotary_embedding_")(x, positions, table, self.head_size, self.is_neox_style)
    return query, key


def _and_subclasses_alike(base: type, method: str) -> list[type]:
    """`base` and its subclasses that inherit `method` from it."""
    found, queue = [], [base]
    while queue:
        cls = queue.pop()
        if getattr(cls, method) is getattr(base, method):
            found.append(cls)
            queue += cls.__subclasses__()
    return found


class DenseLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """A projection that stays dense."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """y [..., N] = x [..., K] W^T + bias."""
        y: torch.Tensor = _op("dense_linear")(x, layer.weight, bias)
        return y


class DenseHeadMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """An output head, or an embedding that is one too."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """y [..., N] = x [..., K] W^T + bias."""
        y: torch.Tensor = _op("dense_linear")(x, layer.weight, bias)
        return y


def use_dense_op(model: torch.nn.Module) -> None:
    """Give every dense projection of a loaded model, and its head, our op: SGLang's torch is a CUDA build.

    Its bf16 product reads a weight at a third of the memory's bandwidth.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(getattr(module, "weight", None), "dtype", None) not in _DTYPES:
            continue
        if type(method) is UnquantizedLinearMethod or getattr(method, "stays_dense", False):
            module.quant_method = DenseLinearMethod()
        elif type(method) is UnquantizedEmbeddingMethod and isinstance(module, VocabParallelEmbedding):
            module.quant_method = DenseHeadMethod()


def register() -> None:
    """Tell SGLang of all of these; idempotent."""
    cpu.library()
    if NAME in ATTENTION_BACKENDS:
        return
    register_attention_backend(NAME)(PagedAttention)
    BaseFusedOp.register_oot_forward(RMSNorm, _rms_norm, NAME)
    BaseFusedOp.register_oot_forward(SiluAndMul, _silu_and_mul, NAME)
    for cls in _and_subclasses_alike(RotaryEmbedding, "forward_native"):
        BaseFusedOp.register_oot_forward(cls, _rotate, NAME)
