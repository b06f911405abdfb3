"""The real SGLang, in its own environment, from the very same wheel."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from bitnet_models import ternary_llama
from test_vllm import FLAG, PROMPTS, assert_same_tokens, job, summaries
from vllm_runner import run


def run_sglang(folder: Path, jobs: list[dict]) -> tuple[list[dict], str]:
    python = os.environ.get("SPARSE_BACKEND_TEST_SGLANG")
    assert python, "run `make test`, or set SPARSE_BACKEND_TEST_SGLANG to the python of .venv/sglang"
    spec, out, log = folder / "jobs.json", folder / "results.json", folder / "log.txt"
    spec.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("run_sglang.py")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    with log.open("w") as f:
        command = [python, str(script), str(spec), str(out)]
        subprocess.run(command, stdout=f, stderr=f, cwd=folder, env=environment, timeout=600, check=False)
    assert out.exists(), log.read_text()[-6000:]
    return json.loads(out.read_text()), log.read_text()


@pytest.fixture(scope="module")
def ternary(python_lm, tmp_path_factory):
    return ternary_llama(python_lm, tmp_path_factory.mktemp("ternary") / "llama", "row")


@pytest.fixture(scope="module")
def results(python_lm_50, pruned_50, ternary, tmp_path_factory):
    jobs = [
        {"model": str(model), "prompts": PROMPTS, "max_tokens": 24, "args": args}
        for model, args in ((pruned_50, {}), (pruned_50, FLAG), (python_lm_50, {}), (ternary, FLAG))
    ]
    return run_sglang(tmp_path_factory.mktemp("sglang"), jobs)


def test_flag_and_compiled_checkpoint_give_the_same_tokens(results):
    (_, flag, compiled, _), log = results
    assert compiled["tokens"] == flag["tokens"]
    assert log.count("sparse-compiled: bitmask: 24 projections, 9.44 MB -> 5.35 MB") == 2
    assert not [line for line in summaries(log) if "pruned as asked" in line]


def test_tokens_are_those_of_vllm_and_of_the_dense_run(results, pruned_50):
    (dense, flag, _, _), _ = results
    reference = run([{**job(pruned_50), "max_tokens": 24}])[0]
    for result in (dense, flag):
        assert_same_tokens(reference, result)


def test_a_ternary_checkpoint_is_found_and_gives_vllms_tokens(results, ternary):
    (_, _, _, result), log = results
    assert_same_tokens(run([{**job(ternary), "max_tokens": 24}])[0], result)
    assert "sparse-compiled: ternary: 24 projections" in log
