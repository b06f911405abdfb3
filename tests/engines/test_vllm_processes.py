"""vLLM as it is deployed: several processes, tensor parallelism, HTTP."""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys

import httpx
import pytest
import reference
from bitnet_models import TERNARY
from processes import serving
from test_vllm import TIE, assert_same_tokens, overrides
from vllm_runner import DEFAULTS, run

PROMPT = "def main(argv):\n    "
PROMPTS = [
    PROMPT,
    "import os\nimport sys\n",
    "class A:\n    def f(self",
    "for i in range(",
    '"""Return the',
    "try:\n    ",
]


def test_tensor_parallel_size_2(python_lm, python_lm_50):
    def spec(**args):
        return [{"model": str(python_lm_50), "prompts": PROMPTS, "max_tokens": 24, "logprobs": 5, "args": args}]

    one = run(spec())[0]
    two = run(spec(tensor_parallel_size=2), VLLM_CPU_OMP_THREADS_BIND="0|1", VLLM_ENABLE_V1_MULTIPROCESSING="1")[0]
    # Row-parallel sums are rounded once more: equal up to shown ties.
    assert_same_tokens(one, two)
    assert two["log"].count("sparse-compiled: bitmask: 24 projections") == 2


def test_tensor_parallel_size_2_of_a_bitnet_model():
    """Sub-norms over what the ranks have cut, one activation scale for all of them, an int8 head."""
    spec = {"model": str(TERNARY), "prompts": PROMPTS, "max_tokens": 24, "logprobs": 5,
            "windows": reference.windows(TERNARY)[:6]}  # fmt: skip
    args = {"max_model_len": 300, **overrides(lm_head="int8")}
    one = run([{**spec, "args": args}])[0]
    args = {**args, "tensor_parallel_size": 2}
    two = run([{**spec, "args": args}], VLLM_CPU_OMP_THREADS_BIND="0|1", VLLM_ENABLE_V1_MULTIPROCESSING="1")[0]
    assert_same_tokens(one, two)
    assert abs(two["perplexity"] / one["perplexity"] - 1) < 0.002
    assert two["log"].count("sparse-compiled: ternary: 24 projections") == 2


@pytest.fixture(scope="module")
def server(python_lm_50, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log.txt"

    def command(port):
        args = ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "256",
                "--dtype", "bfloat16", "--served-model-name", "lm"]  # fmt: skip
        return [sys.executable, "-m", "sparse_backend.cli", "serve", str(python_lm_50), "--", *args]

    with serving(command, {**os.environ, **DEFAULTS, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, log) as (url, _):
        yield url, log


def complete(url, prompt, **extra):
    body = {"model": "lm", "prompt": prompt, "max_tokens": 20, "temperature": 0, **extra}
    choice = httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status().json()["choices"][0]
    return choice if "logprobs" in extra else choice["text"]


def test_http_completion_with_and_without_streaming(server, python_lm_50):
    url, log = server
    whole = complete(url, PROMPT)
    body = {"model": "lm", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "stream": True}
    pieces = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
    assert len(pieces) > 5
    assert "".join(pieces) == whole
    # No flag was given: the checkpoint's own config named the method.
    assert "sparse-compiled: bitmask: 24 projections" in log.read_text()
    command = [sys.executable, "-m", "sparse_backend.cli", "serve", str(python_lm_50), "--show"]
    assert "--quantization" not in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_ten_concurrent_requests_get_the_tokens_of_their_solo_runs(server):
    url, _ = server
    prompts = [PROMPTS[i % len(PROMPTS)] * (1 + i // len(PROMPTS)) for i in range(10)]
    alone = [complete(url, p, logprobs=5)["logprobs"] for p in prompts]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda p: complete(url, p, logprobs=5)["logprobs"], prompts))
    # lm_head and attention are the engine's and may round differently in a batch; our
    # projections do not, so a first difference has to be a shown tie.
    for solo, batched in zip(alone, together, strict=True):
        for step, (a, b) in enumerate(zip(solo["tokens"], batched["tokens"], strict=True)):
            if a != b:
                gap = solo["token_logprobs"][step] - solo["top_logprobs"][step].get(b, -1e9)
                assert gap <= TIE, (step, a, b, gap)
                break
