"""Checkpoints for tests, demo and benchmarks: random ones with real architectures and layer shapes,
and plain copies of compiled ones.

Written shard by shard with safetensors, so that a large model never stands in memory whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sparse_backend.compiler import checkpoint


def llama_config(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, head_dim: int = 128
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "bos_token_id": 0,
        "eos_token_id": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip


# hidden 2560, intermediate 6912, 20/5 heads of 128: the layers of BitNet-2B-4T.
def demo_config(layers: int, vocab: int = 512) -> dict[str, Any]:
    return llama_config(2560, 6912, layers, 20, 5, vocab)


def _llama_tensors(
    config: dict[str, Any], sparsity: float, ternary: bool, generator: torch.Generator
) -> Iterator[dict[str, torch.Tensor]]:
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]

    def projection(n: int, k: int) -> torch.Tensor:
        if ternary:
            return torch.randint(-1, 2, (n, k), generator=generator).bfloat16() * k**-0.5
        weight = torch.randn(n, k, generator=generator).mul_(k**-0.5)
        if sparsity:
            weight[torch.rand(n, k, generator=generator) < sparsity] = 0
        return weight.bfloat16()

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    embedding = torch.randn(config["vocab_size"], hidden, generator=generator).bfloat16()
    yield {"model.embed_tokens.weight": embedding, "model.norm.weight": ones}
    shapes = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (inter, hidden), "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
    }  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        layer = {f"model.layers.{i}.{name}.weight": projection(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            layer[f"model.layers.{i}.{norm}.weight"] = ones.clone()
        yield layer


def save_llama(
    folder: Path, config: dict[str, Any], sparsity: float = 0.0, seed: int = 0, ternary: bool = False
) -> int:
    """Write the checkpoint; returns the bytes of its linear projections."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map, linear_bytes = {}, 0
    for i, tensors in enumerate(_llama_tensors(config, sparsity, ternary, generator)):
        file = f"model-{i:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        linear_bytes += sum(t.nbytes for n, t in tensors.items() if n.endswith("_proj.weight"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return linear_bytes


def plain_copy(compiled: Path, target: Path) -> None:
    """The compiled model as an ordinary dense checkpoint: the same weights, zeros and all."""
    shutil.copytree(compiled, target)
    info = checkpoint.read(compiled)
    for path in info.files:
        tensors = dict(checkpoint.expand(load_file(path).items(), info.modules))
        save_file(tensors, target / path.name, metadata={"format": "pt"})
    config = {k: v for k, v in info.config.items() if k != "quantization_config"}
    (target / "config.json").write_text(json.dumps(config))
