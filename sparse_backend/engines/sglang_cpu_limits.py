"""What SGLang 0.5.23 offers and the platform `sparse_cpu` cannot run: one table, refused at the start.

Most of it needs Triton, CUDA or sgl_kernel, and would fail in the middle of a request otherwise. Found by
reading SGLang's code and by trying; a row goes when its feature is seen to work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import OptionError

NAME = "sparse_cpu"


@dataclasses.dataclass(frozen=True)
class Limit:
    """A server argument and the values that work; others are refused with the reason."""

    argument: str
    allowed: tuple[Any, ...]
    why: str


_KERNELS = "needs Triton or CUDA kernels"
_ATTENTION = (None, NAME, "torch_native")

LIMITS = (
    Limit("attention_backend", _ATTENTION, _KERNELS),
    Limit("prefill_attention_backend", _ATTENTION, _KERNELS),
    Limit("decode_attention_backend", _ATTENTION, _KERNELS),
    Limit("sampling_backend", (None, "pytorch"), _KERNELS),
    Limit("device", (None, "cpu"), "is a CPU platform"),
    Limit("quantization", (None, "unquant", "sparse-compiled"), "has no kernels for other methods"),
    Limit("kv_cache_dtype", (None, "auto", "bf16", "bfloat16"), "keeps the cache in the model's dtype"),
    Limit("page_size", (None, 1), "keeps pages of one token"),
    Limit("speculative_algorithm", (None,), "has no speculative decoding"),
    Limit("enable_hierarchical_cache", (None, False), "cannot copy the cache, which is in main memory already"),
    Limit("enable_lora", (None, False), "has no LoRA kernels"),
    Limit("lora_paths", (None, [], {}), "has no LoRA kernels"),
    Limit("enable_dp_attention", (None, False), _KERNELS),
    Limit("pp_size", (None, 1), "is untested with pipeline parallelism; use --tp-size"),
    Limit("ep_size", (None, 1), "has no expert parallelism"),
    Limit("moe_runner_backend", (None, "auto"), "runs experts in torch only"),
    Limit("moe_a2a_backend", (None, "none"), "has no expert parallelism"),
    Limit("enable_two_batch_overlap", (None, False), "has no device to overlap with"),
    Limit("enable_single_batch_overlap", (None, False), "has no device to overlap with"),
    Limit("disaggregation_mode", (None, "null"), "runs prefill and decode in one process"),
    Limit("enable_deterministic_inference", (None, False), _KERNELS),
    Limit("enable_torch_compile", (None, False), "runs eager: SGLang compiles inside CUDA graphs only"),
    Limit("cuda_graph_backend_prefill", (None, "disabled"), "has no CUDA graphs"),
    Limit("cuda_graph_backend_decode", (None, "disabled"), "has no CUDA graphs"),
    Limit("cpu_offload_gb", (None, 0), "keeps weights in main memory already"),
    Limit("offload_group_size", (None, -1), "keeps weights in main memory already"),
    Limit("enable_fp32_lm_head", (None, False), "computes logits in the model's dtype"),
    Limit("enable_strict_thinking", (None, False), _KERNELS),
)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse what the user asked for and this platform lacks.

    Raises:
        OptionError: naming the flag, the reason and what is allowed.
    """
    if torch.cuda.is_available():
        raise OptionError(
            f"{NAME}: this machine has a GPU, which SGLang would use in places; set CUDA_VISIBLE_DEVICES= "
            "(empty) to serve on the CPU, or unset SGLANG_PLATFORM to serve on the GPU"
        )
    for limit in LIMITS:
        value = arguments.get(limit.argument)
        if value not in limit.allowed:
            flag = "--" + limit.argument.replace("_", "-")
            # None and False are ways not to give the flag at all.
            shown = [str(v) for v in limit.allowed if v is not None and v is not False and v not in ([], {})]
            allowed = f"allowed: {', '.join(shown)}" if shown else "leave it out"
            raise OptionError(f"{flag} {value}: the platform {NAME} {limit.why}; {allowed}")


def check_model(model: Any) -> None:
    """Refuse kinds of models whose layers need Triton kernels.

    Raises:
        OptionError: naming the architecture and what it needs.
    """
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch

    config = model.hf_text_config
    architecture = ", ".join(getattr(model.hf_config, "architectures", None) or ["?"])

    def refuse(what: str) -> None:
        raise OptionError(
            f"{architecture}: the platform {NAME} cannot run models with {what}; vLLM may (--engine vllm)"
        )

    if model.attention_arch == AttentionArch.MLA:
        refuse("latent attention (MLA)")
    if mambaish_config(model) is not None:
        refuse("recurrent layers (Mamba, linear attention)")
    if model.has_attention_sinks:
        refuse("attention sinks")
    if "Llama4" in architecture:
        refuse("chunked attention")
    if getattr(config, "final_logit_softcapping", None):
        refuse("capped logits (final_logit_softcapping)")
    if getattr(config, "enable_lm_head_fp32", False):
        refuse("float32 logits (enable_lm_head_fp32)")
    method = model.quantization
    if method not in (None, "unquant", "sparse-compiled"):
        raise OptionError(
            f"{architecture}: a checkpoint quantized with {method}; {NAME} runs dense, sparse-compiled and "
            "bitnet checkpoints"
        )
