"""The shipped BitNet model in every form a checkpoint can have: all have its codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from sparse_backend.compiler import bitnet

TERNARY = ROOT / "models" / "python-lm-ternary"
Tensors = dict[str, torch.Tensor]


def rewrite(target: Path, change: Callable[[Tensors], Tensors], source: Path = TERNARY, **quantization: Any) -> Path:
    """A copy with other tensors and other keys in its quantization_config; None removes it.

    Biases and a head of its own in the tensors are told to config.json.
    """
    shutil.copytree(source, target)
    save_file(change(load_file(target / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    names = load_file(target / "model.safetensors").keys()
    config["attention_bias"] = any(name.endswith("q_proj.bias") for name in names)
    config["tie_word_embeddings"] = "lm_head.weight" not in names
    own = {**config.pop("quantization_config", {}), **quantization}
    if None not in quantization.values():
        config["quantization_config"] = own
    (target / "config.json").write_text(json.dumps(config))
    return target


def packed_modules(tensors: Tensors) -> list[str]:
    return sorted(n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale"))


def as_bitlinear(tensors: Tensors) -> Tensors:
    """The inverse scales: a weight is code / weight_scale."""
    for name in packed_modules(tensors):
        tensors[f"{name}.weight_scale"] = (1 / tensors[f"{name}.weight_scale"].float()).bfloat16()
    return tensors


def as_masters(tensors: Tensors) -> Tensors:
    """Weights whose absmean rule gives the codes back: zeros are +-0.3 of a scale, the rest above one."""
    generator = torch.Generator().manual_seed(0)
    for name in packed_modules(tensors):
        scale = tensors.pop(f"{name}.weight_scale").float()
        codes = bitnet.unpack_codes(name, tensors[f"{name}.weight"]).float()
        share = float((codes != 0).float().mean())
        signs = torch.randint(0, 2, codes.shape, generator=generator) * 0.6 - 0.3
        large = (1 - 0.3 * (1 - share)) / share
        tensors[f"{name}.weight"] = (torch.where(codes == 0, signs, codes * large) * scale).bfloat16()
    return tensors


def with_norms(tensors: Tensors) -> Tensors:
    """A norm of its own before every layer."""
    generator = torch.Generator().manual_seed(0)
    for name in packed_modules(tensors):
        k = tensors[f"{name}.weight"].shape[1]
        tensors[f"{name}.rms_norm.weight"] = (1 + 0.1 * torch.randn(k, generator=generator)).bfloat16()
    return tensors


def with_biases(tensors: Tensors) -> Tensors:
    """On the attention's layers, as transformers has them: autobitlinear scales them with the product."""
    generator = torch.Generator().manual_seed(0)
    for name in packed_modules(tensors):
        if ".self_attn." in name:
            n = 4 * tensors[f"{name}.weight"].shape[0]
            tensors[f"{name}.bias"] = torch.randn(n, generator=generator).bfloat16()
    return tensors


def untied(tensors: Tensors) -> Tensors:
    """A head that is not the embedding: its rows in half as large steps."""
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 0.5
    return tensors


def unpacked(tensors: Tensors) -> Tensors:
    """Codes as bf16, the scale still apart."""
    for name in packed_modules(tensors):
        tensors[f"{name}.weight"] = bitnet.unpack_codes(name, tensors[f"{name}.weight"]).bfloat16()
    return tensors


FORMS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any]]] = {
    "autobitlinear": (lambda t: t, {}),
    "bitlinear": (as_bitlinear, {"linear_class": "bitlinear"}),
    "online": (as_masters, {"quantization_mode": "online"}),
    "unpacked": (unpacked, {}),
    "untied head": (untied, {}),
    "autobitlinear with norms": (with_norms, {"use_rms_norm": True, "rms_norm_eps": 1e-5}),
    "autobitlinear with biases": (with_biases, {}),
    "bitlinear with norms": (
        lambda t: with_norms(as_bitlinear(t)),
        {"linear_class": "bitlinear", "use_rms_norm": True, "rms_norm_eps": 1e-5},
    ),
}


def save(folder: Path, form: str) -> Path:
    change, quantization = FORMS[form]
    return rewrite(folder / form.replace(" ", "-"), change, **quantization)


def ternary_llama(source: Path, target: Path, scales: str) -> Path:
    """python-lm with every projection ternary, as a plain checkpoint says it: TriLM and unpacked ones."""
    from sparse_backend.compiler.convert import is_projection
    from sparse_backend.formats.ternary import absmean

    def change(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if tensor.dim() == 2 and is_projection(name.removesuffix(".weight")):
                if scales == "row":
                    tensors[name] = torch.cat([absmean(row) for row in tensor.split(1)])
                else:
                    tensors[name] = absmean(tensor, 128 if scales == "group" else None)
        return tensors

    return rewrite(target, change, source=source, quant_method=None)
