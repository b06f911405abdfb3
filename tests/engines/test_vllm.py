"""The real vLLM: lossless runs give the dense run's tokens; options, models, memory of errors."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from random_models import llama_config, save_llama
from safetensors.torch import load_file, save_file
from vllm_runner import run

import models
from sparse_backend import Options
from sparse_backend.compiler.compile import compile_checkpoint

PROMPTS = [
    "def main(argv):\n    ",
    "import os\nimport sys\n\nclass Parser:\n    def __init__(self",
    "for i in range(",
    '"""Return the',
]
FLAG = {"quantization": "sparse-compiled"}

# A first difference is a tie if the dense run itself gave the other token a logprob this
# close: logits of these models are below 16 in magnitude, where bf16 steps by 2^-4, and both
# logits carry a rounding.
TIE = 2 * 2.0**-4


def overrides(**options):
    return {**FLAG, "hf_overrides": {"quantization_config": {"quant_method": "sparse-compiled", **options}}}


def job(model, **args):
    return {"model": str(model), "prompts": PROMPTS, "max_tokens": 40, "logprobs": 5, "args": args}


def assert_same_tokens(dense, other):
    """Token by token; the first difference of a sequence may only be a shown tie."""
    for expected, got, logprobs in zip(dense["tokens"], other["tokens"], dense["logprobs"], strict=True):
        for step, (a, b) in enumerate(zip(expected, got, strict=True)):
            if a != b:
                gap = logprobs[step][str(a)] - logprobs[step].get(str(b), -1e9)
                assert gap <= TIE, f"token {step}: {a} became {b}, {gap:.3f} less likely"
                break


@pytest.fixture(scope="session")
def eager(python_lm, python_lm_50, pruned_50):
    jobs = {
        "dense": job(pruned_50),
        "flag": job(pruned_50, **FLAG),
        "compiled": job(python_lm_50),
        "pruned at load": job(python_lm, **overrides(sparsity=0.5)),
        "rules": job(
            pruned_50, **overrides(ignore=["*.o_proj"], rules=[{"match": "re:.*layers\\.0\\..*", "format": "dense"}])
        ),
        "unpruned dense": job(python_lm),
        "unpruned flag": job(python_lm, **FLAG),
        "unpruned fp16 flag": job(python_lm, dtype="float16", **FLAG),
        "unpruned forced": job(python_lm, **overrides(format="bitmask")),
        "coded": job(pruned_50, **overrides(values="bf16x12")),
        "85% sell": job(python_lm, **overrides(sparsity=0.85)),
        "85% bitmask": job(python_lm, **overrides(sparsity=0.85, format="bitmask")),
        "85% int8": job(python_lm, **overrides(sparsity=0.85, values="int8")),
        "fp16": job(pruned_50, dtype="float16"),
        "fp16 flag": job(pruned_50, dtype="float16", **FLAG),
    }
    return dict(zip(jobs, run(list(jobs.values())), strict=True))


def summaries(log: str) -> list[str]:
    return re.findall(r"sparse-compiled: (.*)", log)


def test_lossless_run_gives_the_dense_tokens(eager):
    assert_same_tokens(eager["dense"], eager["flag"])
    assert_same_tokens(eager["fp16"], eager["fp16 flag"])


def test_every_lossless_format_gives_the_same_tokens(eager):
    assert_same_tokens(eager["dense"], eager["coded"])
    assert_same_tokens(eager["85% bitmask"], eager["85% sell"])


def test_integer_values_are_said_to_round(eager):
    lines = summaries(eager["dense"]["log"])
    assert (
        "42 projections pruned and rounded as asked ('sparsity', 'values'): not the checkpoint's function any more"
        in lines
    )
    (sell, rounded) = [line for line in lines if line.startswith("sell: 24 projections")]
    sizes = [float(re.search(r"-> ([\d.]+) MB", line)[1]) for line in (sell, rounded)]
    assert sizes[1] < sizes[0]
    assert [len(tokens) for tokens in eager["85% int8"]["tokens"]] == [40] * len(PROMPTS)


def test_compiled_checkpoint_equals_conversion_at_load(eager):
    assert eager["compiled"]["tokens"] == eager["flag"]["tokens"]
    assert eager["compiled"]["logprobs"] == eager["flag"]["logprobs"]
    layers = next(line for line in summaries(eager["compiled"]["log"]) if "compiled weights as stored" in line)
    assert not layers.startswith("0 ")


def test_pruning_at_load_equals_compiling(eager):
    assert eager["pruned at load"]["tokens"] == eager["compiled"]["tokens"]


def test_a_dense_model_is_the_same_in_12_bits(eager):
    assert_same_tokens(eager["unpruned dense"], eager["unpruned flag"])
    assert any(line.startswith("bf16x12: 24 projections, 9.44 MB -> 7.") for line in summaries(eager["dense"]["log"]))
    assert_same_tokens(eager["unpruned dense"], eager["unpruned forced"])
    assert eager["unpruned dense"]["tokens"] != eager["dense"]["tokens"]


def test_rules_and_ignore_apply_to_hf_names(eager):
    assert_same_tokens(eager["dense"], eager["rules"])


def test_the_summary_tells_formats_sizes_and_reasons(eager):
    lines = summaries(eager["dense"]["log"])
    assert lines[0] == "bitmask: 24 projections, 9.44 MB -> 5.33 MB"
    assert lines[1] == "all projections: 9.44 MB -> 5.33 MB"
    # ignored o_proj of layers 1..5; layer 0 is dense by rule, its o_proj ignored first
    assert "dense: 6 projections: in 'ignore'" in lines
    assert "dense: 3 projections: format dense was asked for" in lines
    assert any(line.startswith("bitmask: 15 projections") for line in lines)
    assert any(line.startswith("dense: 24 projections: predicted as fast") for line in lines)
    assert any(line.startswith("nothing was packed") for line in lines)
    # Said once by each of the three runs that pruned, not of the checkpoint that was pruned before.
    pruned = "42 projections pruned as asked ('sparsity'): not the checkpoint's function any more"
    assert [line for line in lines if "pruned as asked" in line] == [pruned] * 3


@pytest.fixture(scope="session")
def inductor(pruned_50, python_lm_50):
    args = {"enforce_eager": False}
    jobs = [job(pruned_50, **args), job(pruned_50, **args, **FLAG), job(python_lm_50, **args)]
    return run(jobs)


def test_compiled_by_inductor_gives_the_tokens_of_the_dense_compiled_run(inductor):
    dense, flag, compiled = inductor
    assert_same_tokens(dense, flag)
    assert compiled["tokens"] == flag["tokens"]


def token_prompts(vocab):
    return [[(7 * i * i + 3 * i + s) % vocab for i in range(12)] for s in range(3)]


def test_qwen3_and_qwen3_5(tmp_path):
    jobs = []
    for folder in (models.save_qwen3(tmp_path / "qwen3"), models.save_qwen3_5(tmp_path / "qwen3_5")):
        compiled = tmp_path / f"{folder.name}-compiled"
        compile_checkpoint(folder, compiled, Options())
        args = {"skip_tokenizer_init": True}
        for model, extra in ((folder, {}), (folder, FLAG), (compiled, {})):
            jobs.append({**job(model, **args, **extra), "prompts": token_prompts(512), "max_tokens": 16})
    results = run(jobs)
    for dense, flag, compiled in (results[:3], results[3:]):
        assert_same_tokens(dense, flag)
        assert compiled["tokens"] == flag["tokens"]
    lines = summaries(results[0]["log"])
    assert any(line.startswith("bitmask: 8 projections") for line in lines)
    # Qwen3.5: 3 x (in_proj_qkvz, in_proj_ba, out_proj) + (qkv, o) + 4 x (gate_up, down)
    assert any(line.startswith("bitmask: 19 projections") for line in lines), lines


def test_minilm_embeddings(tmp_path):
    source = models.minilm()
    compile_checkpoint(source, tmp_path / "pruned", Options(sparsity=0.5, values="bf16"))
    sentences = ["A man is eating food.", "Someone eats a meal.", "The sky is blue today."]
    args = {"runner": "pooling"}
    jobs = [
        {"model": str(source), "embed": sentences, "args": args},
        {"model": str(source), "embed": sentences, "args": {**args, **overrides(format="bitmask")}},
        {"model": str(source), "embed": sentences, "args": {**args, **overrides(sparsity=0.5, values="bf16")}},
        {"model": str(tmp_path / "pruned"), "embed": sentences, "args": args},
    ]
    dense, lossless, at_load, compiled = (torch.tensor(r["embeddings"]) for r in run(jobs))
    similarity = torch.nn.functional.cosine_similarity
    assert similarity(dense, lossless).min() > 0.999
    # pruned from fp32 master weights, once before and once after rounding to bf16
    assert similarity(at_load, compiled).min() > 0.999
    assert similarity(dense, compiled).min() > 0.7
    assert similarity(dense[0], dense[1], dim=0) > similarity(dense[0], dense[2], dim=0) + 0.3


def test_what_is_wrong_is_said_before_anything_is_served(python_lm, python_lm_50, pruned_50, tmp_path):
    nan = shutil.copytree(pruned_50, tmp_path / "nan")
    tensors = load_file(nan / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][5, 6] = float("nan")
    save_file(tensors, nan / "model.safetensors", metadata={"format": "pt"})

    def without(name, *removed):
        folder = shutil.copytree(pruned_50, tmp_path / name)
        kept = {n: t for n, t in load_file(folder / "model.safetensors").items() if n not in removed}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def damaged(name, change):
        folder = shutil.copytree(python_lm_50, tmp_path / name)
        data = bytearray((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").write_bytes(change(data))
        return folder

    def flip(position):
        def change(data):
            data[position] ^= 1
            return data

        return change

    with (python_lm_50 / "model.safetensors").open("rb") as f:
        header = int.from_bytes(f.read(8), "little")
        in_name = 8 + f.read(header).find(b"layers.0.mlp.down_proj.bitmask.mask")
    cases = [
        (job(python_lm, **overrides(sparsty=0.5)), "unknown option 'sparsty'; did you mean 'sparsity'"),
        (job(python_lm, **overrides(format="dense", sparsity=0.5)), "contradict"),
        (job(python_lm, **overrides(ignore=["*.q_proj"])), "qkv_proj: the engine merges 3 projections"),
        (job(python_lm, **overrides(ignore=["*"])), "no projection to convert: 'ignore' covers all of them"),
        (job(python_lm_50, **overrides(sparsity=0.7)), "option 'sparsity' was fixed at 0.5"),
        (job(nan, **FLAG), "model.layers.2.mlp.down_proj: weight has NaN values"),
        (job(without("no-down", "model.layers.1.mlp.down_proj.weight"), **FLAG), "layers.1.mlp.down_proj: 0 of"),
        (job(without("no-up", "model.layers.1.mlp.up_proj.weight"), **FLAG), "layers.1.mlp.gate_up_proj: 196608 of"),
        (job(without("no-norm", "model.layers.1.input_layernorm.weight"), **FLAG), "input_layernorm.weight"),
        (
            job(python_lm_50, **overrides(sparsity=0.5, rules=[{"match": "*.o_proj", "sparsity": 0.9}])),
            "'rules' sets keys",
        ),
        (job(damaged("short", lambda d: d[:-100])), "model.safetensors: truncated"),
        (job(damaged("name", flip(in_name))), "its header does not match its checksum"),
        (job(damaged("data", flip(-100))), "is damaged"),
    ]
    results = run([{**case, "may_fail": True} for case, _ in cases])
    for result, (_, message) in zip(results, cases, strict=True):
        assert message in result.get("error", "no error"), (message, result.get("error"))


HEAD = """
import torch
from sparse_backend import Options
from sparse_backend.engines import common, vllm_classes
common.Loading.kernel_device = lambda self, tensor: torch.device("cuda")
config = vllm_classes.SparseCompiledConfig(Options(lm_head="int8"))
method, layer = vllm_classes.SparseCompiledHeadMethod(config, "lm_head"), torch.nn.Module()
x, weight = torch.randn(2, 32).bfloat16(), torch.randn(64, 32).bfloat16()
layer.weight = torch.nn.Parameter(weight, requires_grad=False)
for _ in range(2):  # vLLM may ask twice
    method.process_weights_after_loading(layer)
assert config.loading.refused == {"no cuda kernel for int8": ["lm_head"]}
assert torch.allclose(method.apply(layer, x), x @ weight.T)
print("all checks passed")
"""


def test_an_output_head_is_dense_where_it_has_no_kernel():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HEAD]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.stdout.endswith("all checks passed\n"), result.stderr[-3000:]


def test_load_time_keys_of_a_compiled_checkpoint_can_be_overridden(python_lm_50):
    spec = job(python_lm_50, **overrides(sparsity=0.5, ignore=["*.o_proj"]))
    result = run([spec])[0]
    assert "dense: 6 projections: in 'ignore'" in summaries(result["log"])


def test_memory_falls_by_what_was_packed(tmp_path):
    linear_bytes = save_llama(tmp_path / "m", llama_config(1024, 4096, 6, 8, 4, 512), sparsity=0.7)
    args = {"skip_tokenizer_init": True, "max_model_len": 128}
    jobs = [{"model": str(tmp_path / "m"), "args": {**args, **extra}} for extra in ({}, FLAG)]
    # A process each: what the first allocates, the second would find already there.
    dense, sparse = (run([one])[0] for one in jobs)
    packed = linear_bytes * (0.3 + 1 / 16)
    assert dense["memory"] - sparse["memory"] >= 0.9 * (linear_bytes - packed)
