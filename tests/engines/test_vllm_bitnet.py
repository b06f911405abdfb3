"""1.58-bit checkpoints through the real vLLM, with transformers as the reference."""

from __future__ import annotations

import bitnet_models
import pytest
import reference
import torch
from bitnet_models import FORMS, TERNARY
from test_vllm import FLAG, assert_same_tokens, overrides, summaries
from vllm_runner import run

from sparse_backend import Options
from sparse_backend.compiler.compile import compile_checkpoint

# The log-probabilities of bf16 logits of this model's size lie 2^-5 to 2^-4 apart, and both runs round: two steps. A
# third for activations that become int8: one flips where engine and reference add in another order (attention on AMX).
TIE = 3 * 2.0**-4
VOCABULARY = 4096


def prompts():
    tokenizer = reference.tokenizer(TERNARY)
    return [tokenizer.encode(text).ids for text in reference.PROMPTS]


def job(model, **args):
    return {
        "model": str(model), "prompts": prompts(), "max_tokens": 64, "logprobs": 5, "windows": windows(),
        "args": {"max_model_len": 300, **args},
    }  # fmt: skip


def windows():
    return reference.windows(TERNARY)[:12]


@pytest.fixture(scope="session")
def forms(tmp_path_factory):
    """Every form: its folder, vLLM's results, and transformers on the same folder."""
    root = tmp_path_factory.mktemp("bitnet")
    folders = {name: bitnet_models.save(root, name) for name in FORMS}
    results = run([job(folder) for folder in folders.values()])
    return {name: (folders[name], result) for name, result in zip(folders, results, strict=True)}


@pytest.mark.parametrize("form", FORMS)
def test_perplexity_and_tokens_are_transformers(forms, form):
    folder, result = forms[form]
    model = reference.Reference(folder)
    assert abs(result["perplexity"] / model.perplexity(windows()) - 1) < 0.005
    # All eight prompts for the form most checkpoints have, two for each of the others.
    for prompt, got in list(zip(prompts(), result["tokens"], strict=True))[: 8 if form == "autobitlinear" else 2]:
        expected, gaps = model.greedy(prompt, 64)
        for step, (a, b) in enumerate(zip(expected, got, strict=True)):
            if a != b:
                assert gaps[step] <= TIE, f"token {step}: {a} became {b}, {gaps[step]:.3f} less likely"
                break


def engine_logits(dtype):
    """[prompts, vocabulary]: of each prompt's next token."""
    asked = {**job(TERNARY, max_logprobs=-1, logprobs_mode="raw_logits"), "max_tokens": 1, "logprobs": VOCABULARY}
    del asked["windows"]
    result = run([{**asked, "args": {**asked["args"], "dtype": dtype}}])[0]
    return torch.tensor([[steps[0][str(token)] for token in range(VOCABULARY)] for steps in result["logprobs"]])


def last_logits(model):
    return torch.stack([model.logits(prompt)[-1] for prompt in prompts()])


def relative(got, expected):
    """Error of each prompt."""
    return (got - expected).norm(dim=-1) / expected.norm(dim=-1)


def test_logits_are_transformers_in_bf16_where_both_round_each_layer():
    got, expected = engine_logits("bfloat16"), last_logits(reference.Reference(TERNARY))
    assert (got - expected).norm() / expected.norm() < 0.02


def test_logits_are_transformers_in_float32():
    """To the fifth digit, in one of the ways in which transformers itself rounds activations.

    Some activation of a prompt always lies within 1e-6 of the middle between two int8 codes: whoever sums in another
    order may round it the other way, which moves the logits by a per cent. So does transformers when its embeddings
    move by a millionth: a prompt's logits have to be those of one of such runs, and most the unmoved run's.
    """
    got = engine_logits("float32")
    model = reference.Reference(TERNARY, torch.float32)
    errors = [relative(got, last_logits(model))]
    embedding = model.model.get_input_embeddings().weight.data
    for _ in range(40):
        noise = 1e-6 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(len(errors)))
        original = embedding.clone()
        embedding.mul_(1 + noise)
        errors.append(relative(got, last_logits(model)))
        embedding.copy_(original)
    assert (errors[0] < 1e-4).sum() >= len(prompts()) // 2, errors[0]
    assert (torch.stack(errors).min(0).values < 1e-4).all(), torch.stack(errors)


def test_codes_that_are_unpacked_are_the_same_codes(forms):
    assert forms["unpacked"][1]["tokens"] == forms["autobitlinear"][1]["tokens"]


def test_the_log_says_what_it_is(forms):
    lines = summaries(forms["autobitlinear"][1]["log"])
    assert "BitNet checkpoint: ternary weights, int8 activations per token" in lines
    assert any(line.startswith("ternary: 24 projections, 9.44 MB -> 1.2") for line in lines)


@pytest.fixture(scope="session")
def variants(tmp_path_factory, forms, python_lm):
    root = tmp_path_factory.mktemp("ternary")
    compile_checkpoint(TERNARY, root / "compiled", Options())
    compile_checkpoint(TERNARY, root / "1.6", Options(bits=1.6))
    compile_checkpoint(forms["bitlinear"][0], root / "compiled bitlinear", Options())
    compile_checkpoint(root / "compiled", root / "bitnet again", Options(), layout="bitnet")
    masters = bitnet_models.rewrite(root / "masters", bitnet_models.as_masters, quant_method=None)
    jobs = {
        "compiled": job(root / "compiled"),
        "1.6": job(root / "1.6"),
        "compiled bitlinear": job(root / "compiled bitlinear"),
        "bitnet again": job(root / "bitnet again"),
        "masters": job(masters, **FLAG),
        "masters dense": job(masters),
        "int8 head": job(TERNARY, **overrides(lm_head="int8")),
        "int8 untied head": job(forms["untied head"][0], **overrides(lm_head="int8")),
        "keep": job(TERNARY, **overrides(activations="keep")),
        "forced": job(python_lm, **overrides(format="ternary", group_size=64)),
    }
    for scales in ("tensor", "row", "group"):
        folder = bitnet_models.ternary_llama(python_lm, root / f"llama-{scales}", scales)
        jobs[f"llama {scales} dense"] = job(folder)
        jobs[f"llama {scales}"] = job(folder, **FLAG)
    return dict(zip(jobs, run(list(jobs.values())), strict=True))


def test_compiled_checkpoints_and_both_ways_back_equal_the_original(variants, forms):
    for name in ("compiled", "1.6", "bitnet again"):
        assert variants[name]["tokens"] == forms["autobitlinear"][1]["tokens"], name
        assert variants[name]["logprobs"] == forms["autobitlinear"][1]["logprobs"], name
    assert variants["compiled bitlinear"]["logprobs"] == forms["bitlinear"][1]["logprobs"]


def test_masters_need_the_flag_and_run_as_the_online_form(variants, forms):
    assert variants["masters"]["tokens"] == forms["online"][1]["tokens"]
    assert variants["masters dense"]["tokens"] != variants["masters"]["tokens"]


def test_an_int8_head_is_said_and_hardly_felt(variants, forms):
    for name, form in (("int8 head", "autobitlinear"), ("int8 untied head", "untied head")):
        assert abs(variants[name]["perplexity"] / forms[form][1]["perplexity"] - 1) < 0.005
    lines = summaries(variants["int8 head"]["log"])
    assert any(line.startswith("int8: 1 projections, 2.10 MB -> 1.07 MB") for line in lines)
    assert "the output head was rounded as asked ('lm_head'): not the checkpoint's function any more" in lines


def test_activations_can_be_kept(variants, forms):
    assert variants["keep"]["tokens"] != forms["autobitlinear"][1]["tokens"]
    assert abs(variants["keep"]["perplexity"] / forms["autobitlinear"][1]["perplexity"] - 1) < 0.02


@pytest.mark.parametrize("scales", ["tensor", "row", "group"])
def test_plain_ternary_checkpoints_are_found_and_run_as_dense(variants, scales):
    dense, packed = variants[f"llama {scales} dense"], variants[f"llama {scales}"]
    assert_same_tokens(dense, packed)
    assert abs(packed["perplexity"] / dense["perplexity"] - 1) < 0.005
    lines = summaries(packed["log"])
    assert sum(line.startswith("ternary: 24 projections") for line in lines) >= 1


def test_rounding_a_model_to_ternary_is_said_loudly(variants):
    lines = summaries(variants["forced"]["log"])
    assert "42 projections rounded as asked ('format', 'values'): not the checkpoint's function any more" in lines


def test_what_is_wrong_with_a_bitnet_checkpoint_is_said(tmp_path):
    def without_scale(tensors):
        del tensors["model.layers.2.mlp.up_proj.weight_scale"]
        return tensors

    def wrong_code(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"][5, 6] |= 0b11
        return tensors

    def zero_scale(tensors):
        tensors["model.layers.2.mlp.up_proj.weight_scale"].zero_()
        return tensors

    cases = [
        (without_scale, {}, "has no model.layers.2.mlp.up_proj.weight_scale"),
        (wrong_code, {}, "model.layers.2.mlp.up_proj.weight: 1 byte(s) hold a two-bit code 3"),
        (zero_scale, {}, "weight_scale: must be one positive number"),
        (lambda t: t, {"linear_class": "trilinear"}, "linear_class 'trilinear'"),
    ]
    jobs = []
    for i, (change, quantization, _) in enumerate(cases):
        folder = bitnet_models.rewrite(tmp_path / str(i), change, **quantization)
        jobs.append({**job(folder), "may_fail": True})
    for result, (_, _, message) in zip(run(jobs), cases, strict=True):
        assert message in result.get("error", "no error"), (message, result.get("error"))
