"""Runs vLLM jobs in a process of its own and prints what they gave as JSON.

One process so that its memory can be read and its state cannot leak; the engine core runs
inside it (VLLM_ENABLE_V1_MULTIPROCESSING=0), which starts in seconds. Used by the engine
tests, the demo and the benchmarks:

    results = run([{"model": path, "prompts": [...], "max_tokens": 20, "args": {...}}])
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from processes import answer_jobs, run_jobs

DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def run(jobs: list[dict[str, Any]], timeout: float = 900, **environment: str | None) -> list[dict[str, Any]]:
    """Results in order: `tokens`, `logprobs`, `rss`, `speed`, ... or `error`; all carry `log`.

    `environment`: variables beside DEFAULTS; None leaves one of these out.
    """
    settings = {k: v for k, v in {**DEFAULTS, **os.environ, **environment}.items() if v is not None}
    return run_jobs(sys.executable, __file__, jobs, settings, timeout)


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    """The most bytes that were resident at once since this process began."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _anonymous() -> int:
    """Resident bytes that are not pages of files: what weights and caches take."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return _resident()


def _generate(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=job.get("logprobs"))
    prompts = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in job["prompts"]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    result: dict[str, Any] = {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "text": [o.outputs[0].text for o in outputs],
    }
    if job.get("logprobs"):
        result["logprobs"] = [
            [{str(t): lp.logprob for t, lp in step.items()} for step in o.outputs[0].logprobs] for o in outputs
        ]
    return result


def _decode_speed(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Median tokens/s of decoding alone: time of a long run minus that of a short one.

    With `kernels`, what step_kernels.StepKernels takes, also the time of the projections alone, after every run.
    """
    from step_kernels import StepKernels
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": [i % 500 + 2 for i in range(job["speed"].get("prompt", 16))]}
    batch = job["speed"].get("batch", 1)
    long, short = job["speed"]["tokens"], 4

    def seconds(count: int) -> float:
        start = time.perf_counter()
        llm.generate([prompt] * batch, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - start

    kernels = StepKernels(**job["speed"]["kernels"]) if "kernels" in job["speed"] else None
    seconds(short)
    steps, in_kernels = [], []
    for _ in range(job["speed"]["repeats"]):
        steps.append((seconds(long) - seconds(short)) / (long - short))
        if kernels is not None:
            in_kernels.append(kernels.seconds(batch))
    rates = sorted(batch / step for step in steps)
    return {
        "tokens_per_s": rates[len(rates) // 2], "tokens_per_s_all": rates, "step_s_all": steps,
        "kernels_s_all": in_kernels,
    }  # fmt: skip


def _prefill_speed(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Prompt tokens/s of one prompt: `prefill` tokens in, one out; each time another prompt, or it is cached."""
    from vllm import SamplingParams

    length, rates = job["prefill"]["tokens"], []
    for i in range(job["prefill"]["repeats"] + 1):
        prompt = {"prompt_token_ids": [(7 * t + 13 * i) % 500 + 2 for t in range(length)]}
        start = time.perf_counter()
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), use_tqdm=False)
        rates.append(length / (time.perf_counter() - start))
    return {"prefill_per_s_all": sorted(rates[1:])}


def _perplexity(llm: Any, job: dict[str, Any]) -> float:
    """exp of the mean negative log-likelihood over windows of token ids, each after token 0."""
    import math

    from vllm import SamplingParams

    windows = [{"prompt_token_ids": w} for w in job["windows"]]
    outputs = llm.generate(windows, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    total, count = 0.0, 0
    for window, output in zip(job["windows"], outputs, strict=True):
        for token, step in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            total -= step[token].logprob
            count += 1
    return math.exp(total / count)


def _job(job: dict[str, Any]) -> dict[str, Any]:
    import gc

    import torch
    from vllm import LLM

    before = _anonymous()
    start = time.perf_counter()
    args = {"dtype": "bfloat16", "max_model_len": 256, "enforce_eager": True, "seed": 0, **job.get("args", {})}
    llm = LLM(job["model"], **args)
    result: dict[str, Any] = {"load_s": time.perf_counter() - start}
    gc.collect()
    # Before any request: weights, and a KV cache that is reserved but not yet touched.
    result["memory"] = _anonymous() - before
    result["resident"], result["peak_resident"] = _resident(), _peak()
    result["threads"] = torch.get_num_threads()
    if "embed" in job:
        result["embeddings"] = [o.outputs.embedding for o in llm.embed(job["embed"], use_tqdm=False)]
    if "prompts" in job:
        result.update(_generate(llm, job))
    if "windows" in job:
        result["perplexity"] = _perplexity(llm, job)
    if "speed" in job:
        result.update(_decode_speed(llm, job))
    if "prefill" in job:
        result.update(_prefill_speed(llm, job))
    return result


if __name__ == "__main__":
    answer_jobs(_job)
