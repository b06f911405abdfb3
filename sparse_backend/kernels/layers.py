"""What a transformer computes around its projections: naive references and fakes of csrc/layers.

The ops are `torch.ops.sparse_backend.{paged_attention, dense_linear, rms_norm, add_rms_norm,
rotary_embedding_, silu_and_mul}`. They accumulate in float32 and round once at the end, in an
order that depends on neither batch, threads nor, for finite values, how a prompt is cut into chunks.
"""

from __future__ import annotations

import torch


def naive_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    new_tokens: torch.Tensor | None,
    scale: float,
    window: int = -1,
    logit_cap: float = 0.0,
    causal: bool = True,
) -> torch.Tensor:
    """Attention of new tokens over a paged KV cache, in float64.

    Args:
        q: [T, H, D], the new tokens of all sequences, one sequence after the other.
        k_cache: [slots, H_kv, D]; `v_cache` [slots, H_kv, D_v]. The new tokens are already in it.
        slot_table: [R, positions] int32; row r says in which slot each position of a sequence is.
        rows: [S] int64, each sequence's row of `slot_table`.
        lengths: [S] int64, positions of each sequence, new ones included.
        new_tokens: [S] int64, how many of them are new; None: one each.
        scale: multiplies q k^T.
        window: a token sees this many positions before its own; negative: all.
        logit_cap: scores become cap * tanh(score / cap); 0: they stay.
        causal: a token sees positions up to its own; otherwise all of its sequence.

    Returns:
        [T, H, D_v] in q's dtype.
    """
    heads, kv_heads = q.shape[1], k_cache.shape[1]
    outputs, first = [], 0
    for i, length in enumerate(lengths.tolist()):
        count = 1 if new_tokens is None else int(new_tokens[i])
        slots = slot_table[int(rows[i]), :length].long()
        k = k_cache[slots].double().repeat_interleave(heads // kv_heads, 1)
        v = v_cache[slots].double().repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("thd,phd->htp", q[first : first + count].double(), k) * scale
        if logit_cap:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        own = torch.arange(length - count, length)[:, None]
        position = torch.arange(length)[None]
        seen = position <= own if causal else torch.ones(count, length, dtype=torch.bool)
        if window >= 0:
            seen = seen & (position >= own - window)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("htp,phd->thd", weights, v))
        first += count
    return torch.cat(outputs).to(q.dtype) if outputs else q.new_empty(0, heads, v_cache.shape[2])


def naive_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, round_before_weight: bool) -> torch.Tensor:
    """x [..., N] over its root mean square, times weight [N] (Zhang and Sennrich 2019), in float32.

    `round_before_weight` rounds to x's dtype before the weight too, as transformers' Llama does.
    """
    full = x.float()
    normed = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + eps)
    if round_before_weight:
        normed = normed.to(x.dtype).float()
    return (normed * weight.float()).to(x.dtype)


def naive_rotary_embedding(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, head_dim: int, halves: bool
) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021) of x [T, heads * head_dim]; only the first columns are rotated.

    `cos_sin` [positions, rotary_dim] float32 holds cosines, then sines. Pairs are (i, i + rotary_dim / 2) with
    `halves` (NeoX), else (2i, 2i + 1) (GPT-J).
    """
    rotary = cos_sin.shape[1]
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    y = x.view(x.shape[0], -1, head_dim).clone()
    part = y[..., :rotary].float()
    first, second = part.chunk(2, dim=-1) if halves else (part[..., ::2], part[..., 1::2])
    turned = first * cos - second * sin, second * cos + first * sin
    rotated = torch.cat(turned, -1) if halves else torch.stack(turned, -1).flatten(-2)
    y[..., :rotary] = rotated.to(x.dtype)
    return y.view_as(x)


def naive_silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(x[..., :N]) * x[..., N:] (SwiGLU, Shazeer 2020), in float32, rounded once."""
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def register_fakes() -> None:
    """Shapes for torch.compile and the meta device."""

    @torch.library.register_fake("sparse_backend::paged_attention")  # type: ignore[untyped-decorator]
    def _attention(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_table: torch.Tensor,
        rows: torch.Tensor,
        lengths: torch.Tensor,
        new_tokens: torch.Tensor | None,
        scale: float,
        window: int,
        logit_cap: float,
        causal: bool,
    ) -> torch.Tensor:
        return q.new_empty((q.shape[0], q.shape[1], v_cache.shape[2]))

    @torch.library.register_fake("sparse_backend::dense_linear")  # type: ignore[untyped-decorator]
    def _dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    @torch.library.register_fake("sparse_backend::rms_norm")  # type: ignore[untyped-decorator]
    def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, round_before_weight: bool) -> torch.Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("sparse_backend::add_rms_norm")  # type: ignore[untyped-decorator]
    def _add_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, round_before_weight: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_empty(x.shape), x.new_empty(x.shape)

    @torch.library.register_fake("sparse_backend::rotary_embedding_")  # type: ignore[untyped-decorator]
    def _rotate(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, head_dim: int, halves: bool) -> None:
        return None

    @torch.library.register_fake("sparse_backend::silu_and_mul")  # type: ignore[untyped-decorator]
    def _gate(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
