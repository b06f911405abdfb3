"""The real SGLang, in its own environment, from the very same wheel."""

from __future__ import annotations

import json
import re
import subprocess

import psutil
import pytest
import reference
import sglang_runner
from bitnet_models import TERNARY, ternary_llama
from test_vllm import FLAG, PROMPTS, TIE, assert_same_tokens, job, overrides, summaries
from vllm_runner import run

import models

# What vLLM and SGLang both run; the second of each pair are SGLang's own arguments.
HEAD = '{"quantization_config": {"quant_method": "sparse-compiled", "lm_head": "int8"}}'


def bitnet_job(**args):
    tokenizer = reference.tokenizer(TERNARY)
    prompts = [tokenizer.encode(text).ids for text in reference.PROMPTS]
    return {"model": str(TERNARY), "prompts": prompts, "max_tokens": 24, "logprobs": 5, "args": args}


def qwen_job(folder, **args):
    # Of random weights, tokens of one prompt after the other differ; of ids, because it has no tokenizer.
    prompts = [[i % 500 + 2 for i in range(start, start + 20)] for start in (0, 100, 200)]
    return {"model": str(folder), "prompts": prompts, "max_tokens": 24, "logprobs": 5, "args": args}


@pytest.fixture(scope="module")
def results(python_lm_50, pruned_50, python_lm, tmp_path_factory):
    """name: (SGLang's result, vLLM's result of the same model)."""
    root = tmp_path_factory.mktemp("sglang")
    ternary, qwen = ternary_llama(python_lm, root / "ternary", "row"), models.save_qwen3(root / "qwen3")
    bare = {"skip_tokenizer_init": True}
    vllm = {
        "dense": {**job(pruned_50), "max_tokens": 24},
        "ternary": {**job(ternary), "max_tokens": 24},
        "qwen3": qwen_job(qwen, **bare),
        "bitnet": bitnet_job(),
        "bitnet int8 head": bitnet_job(**overrides(lm_head="int8")),
    }
    small = {"chunked_prefill_size": 16, "page_size": 1}
    sglang = {
        "dense": ("dense", {**job(pruned_50), "args": {"attention_backend": "torch_native", "max_total_tokens": None}}),
        "flag": ("dense", {**job(pruned_50), "args": FLAG, "times": 2}),
        "compiled": ("dense", {**job(python_lm_50), "args": {**small, "enable_mixed_chunk": True}, "times": 2}),
        "ternary": ("ternary", {**job(ternary), "args": FLAG}),
        "qwen3": ("qwen3", qwen_job(qwen, **bare, **FLAG)),
        "bitnet int8 head": ("bitnet int8 head", bitnet_job(json_model_override_args=HEAD)),
        "bitnet on two ranks": ("bitnet", bitnet_job(tp_size=2)),
    }
    expected = dict(zip(vllm, run(list(vllm.values())), strict=True))
    got = sglang_runner.run([{**j, "max_tokens": 24} for _, j in sglang.values()])
    return {name: (r, expected[like]) for (name, (like, _)), r in zip(sglang.items(), got, strict=True)}


@pytest.mark.parametrize(
    "name", ["dense", "flag", "compiled", "ternary", "qwen3", "bitnet int8 head", "bitnet on two ranks"]
)
def test_tokens_are_those_of_vllm(results, name):
    got, expected = results[name]
    assert [len(tokens) for tokens in got["tokens"]] == [24] * len(expected["tokens"])
    assert_same_tokens(expected, got)


def test_a_compiled_checkpoint_in_chunks_is_the_converted_model(results):
    """Chunks of 16 tokens, mixed with decoding, against whole prompts; and both again from the prefix cache."""
    flag, compiled = results["flag"][0], results["compiled"][0]
    assert_same_tokens(flag, compiled)
    assert flag["cached"] == [0] * len(PROMPTS)
    for result in (flag, compiled):
        assert sum(result["again_cached"]) > 0
        assert_same_tokens(result, {"tokens": result["again_tokens"]})


def test_the_cache_leaves_memory_to_others(results, pruned_50):
    """By default: SGLang fills it with zeros at the start."""
    config = json.loads((pruned_50 / "config.json").read_text())
    per_token = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    (most,) = {int(n) for n in re.findall(r"max_total_num_tokens=(\d+)", results["dense"][0]["log"])} - {4096}
    assert per_token * most <= psutil.virtual_memory().total / 4


def ranks_log(results):
    return results["bitnet on two ranks"][0]["log"]


def test_the_log_says_what_it_is(results):
    lines = summaries(results["flag"][0]["log"])
    assert lines.count("bitmask: 24 projections, 9.44 MB -> 5.33 MB") == 2  # flag and compiled
    assert not [line for line in lines if "pruned as asked" in line]
    assert [line for line in lines if line.startswith("ternary: 24 projections")]
    assert lines.count("BitNet checkpoint: ternary weights, int8 activations per token") == 3  # two ranks
    assert lines.count("int8: 1 projections, 2.10 MB -> 1.07 MB") == 1
    assert "the output head was rounded as asked ('lm_head'): not the checkpoint's function any more" in lines
    cores = [
        set(found.split(",")) for found in re.findall(r"TP\d\] sparse_cpu: .* on cores ([\d,]+)", ranks_log(results))
    ]
    assert len(cores) == 2
    assert not cores[0] & cores[1]


def test_logprobs_are_vllms(results):
    """Of the first token of every prompt, before any tie can have sent them apart."""
    for name in ("flag", "ternary", "qwen3"):
        got, expected = results[name]
        for ours, theirs in zip(got["logprobs"], expected["logprobs"], strict=True):
            both = ours[0].keys() & theirs[0].keys()
            assert len(both) >= 3
            assert all(abs(ours[0][token] - theirs[0][token]) <= TIE for token in both)


CHECKS = """
import torch
import sparse_backend as sb
from sparse_backend.formats import naive_linear

weight = torch.randn(33, 130).masked_fill_(torch.rand(33, 130) < 0.5, 0).bfloat16()
packed = sb.pack(weight)
x = torch.randn(3, 130).bfloat16()
assert torch.allclose(sb.linear(x, packed).double(), naive_linear(x, packed), rtol=1e-2, atol=1e-2)
torch.library.opcheck(torch.ops.sparse_backend.bitmask_linear.default, (x, packed.lower().tensors["packed"], None, 33))
torch.library.opcheck(torch.ops.sparse_backend.dense_linear.default, (x, weight, None))

# Options name modules as the checkpoint does; here with the renaming of a real SGLang model.
from sglang.srt.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as model
from sparse_backend.engines.names import Names
names, mapped = Names(merged={"qkv_proj": ["q_proj", "k_proj", "v_proj"]}), model.hf_to_sglang_mapper.apply_list
hf = [f"model.language_model.layers.0.self_attn.{p}_proj" for p in "qkv"]
names.learn(hf, lambda name: next(iter(mapped([name])), None))
assert names.hf_parts(mapped([hf[0]])[0].replace("q_proj", "qkv_proj")) == hf, names

from sparse_backend.engines.sglang_cpu_platform import parse_cores, share_cores
from sparse_backend.errors import OptionError
assert share_cores([0, 1, 2, 3, 8], 2) == "0,1|2,3"
assert parse_cores("0-2,8") == parse_cores([0, 1, 2, 8]) == [0, 1, 2, 8]
assert parse_cores(None) == []
try:
    share_cores([0, 1], 3)
except OptionError as error:
    assert "lower --tp-size" in str(error)
else:
    raise AssertionError

# A misspelt argument would never be refused; a default that is not allowed would refuse every start.
import msgspec
from sglang.srt.server_args import ServerArgs
from sparse_backend.engines.sglang_cpu_limits import LIMITS
fields = {field.name: field for field in msgspec.structs.fields(ServerArgs)}
for limit in LIMITS:
    field = fields[limit.argument]
    default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    assert default in limit.allowed, (limit, default)

# Where the device has no kernel for it, the output head stays SGLang's.
from sparse_backend.engines import common, sglang_classes
common.Loading.kernel_device = lambda self, tensor: torch.device("cuda")
model, config = torch.nn.Module(), sglang_classes.SparseCompiledConfig(sb.Options(lm_head="int8"))
head = sglang_classes.ParallelLMHead.__new__(sglang_classes.ParallelLMHead)
torch.nn.Module.__init__(head)
head.weight, head.quant_method = torch.nn.Parameter(weight), "SGLang's"
model.lm_head = head
sglang_classes._convert_head(model, config)
assert config.loading.refused == {"no cuda kernel for int8": ["lm_head"]}
assert head.quant_method == "SGLang's" and torch.equal(head.weight, weight)
print("all checks passed")
"""


def test_the_wheel_and_the_adapter_on_sglangs_torch(tmp_path):
    command = [sglang_runner.python(), "-c", CHECKS]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=sglang_runner.environment(), check=False
    )
    assert result.stdout.endswith("all checks passed\n"), result.stderr[-3000:]
