"""Runs SGLang jobs in SGLang's environment and gives what vllm_runner gives for the same jobs.

    results = run([{"model": path, "prompts": [...], "max_tokens": 20, "args": {...}}])

`args` are sgl.Engine's. The parent needs no SGLang: the script runs itself with the python that
SPARSE_BACKEND_TEST_SGLANG names (`make test` sets it), or that of .venv/sglang.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from processes import answer_jobs, run_jobs

DEFAULTS = {"SGLANG_PLATFORM": "sparse_cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def python() -> str:
    """SGLang's interpreter."""
    beside = Path(__file__).resolve().parents[1] / ".venv" / "sglang" / "bin" / "python"
    found = os.environ.get("SPARSE_BACKEND_TEST_SGLANG", str(beside))
    if not Path(found).exists():
        raise RuntimeError(f"{found} is not there: run `make env-sglang`, or set SPARSE_BACKEND_TEST_SGLANG")
    return found


def environment(**more: str) -> dict[str, str]:
    """For a process of SGLang's environment."""
    return {**DEFAULTS, **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **more}


def run(jobs: list[dict[str, Any]], timeout: float = 900, **variables: str) -> list[dict[str, Any]]:
    """Results in order: `tokens`, `load_s`, `tokens_per_s`, ... or `error`; all carry `log`."""
    return run_jobs(python(), __file__, jobs, environment(**variables), timeout)


def _rates(engine: Any, prompts: list[list[int]], tokens: int, repeats: int) -> list[float]:
    """Decode tokens/s: the time of a long run minus that of a short one."""
    short = 4

    def seconds(count: int) -> float:
        start = time.perf_counter()
        engine.generate(input_ids=prompts, sampling_params=_greedy(count))
        return time.perf_counter() - start

    seconds(short)
    return sorted(len(prompts) * (tokens - short) / (seconds(tokens) - seconds(short)) for _ in range(repeats))


def _greedy(tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}


def _generate(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    prompts, sampling = job["prompts"], _greedy(job["max_tokens"])
    count = job.get("logprobs")
    wanted: dict[str, Any] = {"return_logprob": True, "top_logprobs_num": count} if count else {}
    if isinstance(prompts[0], str):
        outputs = engine.generate(prompts, sampling, **wanted)
    else:
        outputs = engine.generate(input_ids=prompts, sampling_params=sampling, **wanted)
    result: dict[str, Any] = {
        "tokens": [o["output_ids"] for o in outputs],
        "cached": [o["meta_info"].get("cached_tokens") for o in outputs],
    }
    if count:
        result["logprobs"] = [
            [{str(token): logprob for logprob, token, _ in step} for step in o["meta_info"]["output_top_logprobs"]]
            for o in outputs
        ]
    return result


def _job(job: dict[str, Any]) -> dict[str, Any]:
    import sglang

    start = time.perf_counter()
    args = {"dtype": "bfloat16", "max_total_tokens": 4096, "log_level": "info", **job.get("args", {})}
    engine = sglang.Engine(model_path=job["model"], **args)
    result: dict[str, Any] = {"load_s": time.perf_counter() - start}
    try:
        for again in range(job.get("times", 1)):  # the second time, prompts are in the prefix cache
            if "prompts" in job:
                generated = _generate(engine, job)
                result.update(generated if not again else {f"again_{k}": v for k, v in generated.items()})
        if "speed" in job:
            speed = job["speed"]
            prompt = [i % 500 + 2 for i in range(speed.get("prompt", 16))]
            rates = _rates(engine, [prompt] * speed.get("batch", 1), speed["tokens"], speed["repeats"])
            result.update(tokens_per_s=rates[len(rates) // 2], tokens_per_s_all=rates)
        if "prefill" in job:
            length, rates = job["prefill"]["tokens"], []
            for i in range(job["prefill"]["repeats"] + 1):
                prompt = [(7 * t + 13 * i) % 500 + 2 for t in range(length)]
                start = time.perf_counter()
                engine.generate(input_ids=[prompt], sampling_params=_greedy(1))
                rates.append(length / (time.perf_counter() - start))
            result["prefill_per_s_all"] = sorted(rates[1:])
    finally:
        engine.shutdown()
    return result


if __name__ == "__main__":
    answer_jobs(_job)
