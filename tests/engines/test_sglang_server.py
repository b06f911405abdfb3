"""SGLang as it is deployed: its own server over HTTP, many clients, and what ends it at the start."""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import subprocess
import time

import httpx
import psutil
import pytest
import sglang_runner
from processes import serving
from test_vllm import TIE

CLIENTS = 32


@pytest.fixture(scope="module")
def server(python_lm_50, tmp_path_factory):
    """(url, pid) of the server."""

    def command(port):
        args = ["--host", "127.0.0.1", "--port", str(port), "--max-total-tokens", "16384"]
        serve = ["-m", "sparse_backend.cli", "serve", str(python_lm_50), "--engine", "sglang", "--"]
        return [sglang_runner.python(), *serve, *args]

    env = {k: v for k, v in sglang_runner.environment().items() if k != "SGLANG_PLATFORM"}  # `serve` chooses it
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serving(command, env, log, "/health_generate") as (url, pid):
        yield url, pid
        children = psutil.Process(pid).children(recursive=True)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, "the server left processes behind"


def request(i):
    """Prompts and answers of many lengths."""
    ids = [(37 * i + 11 * t) % 4000 + 4 for t in range(3 + (i * 29) % 120)]
    sampling = {"temperature": 0, "max_new_tokens": 8 + (i * 7) % 60, "ignore_eos": True}
    return {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 5}


def ask(url, i):
    reply = httpx.post(f"{url}/generate", json=request(i), timeout=300)
    assert reply.status_code == 200, reply.text
    return reply.json()


def stream(url, i, cancel_after=None):
    """The last message of a stream; None if the client went away in the middle."""
    last, messages = None, 0
    with httpx.stream("POST", f"{url}/generate", json={**request(i), "stream": True}, timeout=300) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if not line.startswith("data:") or line == "data: [DONE]":
                continue
            last, messages = json.loads(line[5:]), messages + 1
            if messages == cancel_after:
                return None
    return last


def resident(pid):
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(p.memory_info().rss for p in processes)


def idle(url):
    """Whether nothing runs any more: only then may the prefix cache be emptied."""
    return httpx.post(f"{url}/flush_cache", timeout=60).status_code == 200


def test_32_clients_some_of_which_go_away(server):
    url, pid = server
    alone = [ask(url, i) for i in range(CLIENTS)]
    wait_until_idle(url)
    before = resident(pid)
    cancelled = {i for i in range(CLIENTS) if i % 5 == 2}
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        jobs = [pool.submit(stream, url, i, 3 if i in cancelled else None) for i in range(CLIENTS)]
        together = [job.result() for job in jobs]
    assert {i for i, reply in enumerate(together) if reply is None} == cancelled
    for i in set(range(CLIENTS)) - cancelled:
        assert_same(alone[i], together[i])
    wait_until_idle(url)
    assert resident(pid) < before + 48 * 2**20
    # And it still answers.
    assert_same(alone[0], ask(url, 0))


def wait_until_idle(url):
    deadline = time.monotonic() + 60
    while not idle(url):
        assert time.monotonic() < deadline, "requests of clients that went away are still running"
        time.sleep(0.2)


def assert_same(alone, other):
    """Token by token, up to a tie that the solo run itself shows."""
    expected, got = alone["output_ids"], other["output_ids"]
    assert len(expected) == len(got)
    tops = alone["meta_info"]["output_top_logprobs"]
    for step, (a, b) in enumerate(zip(expected, got, strict=True)):
        if a != b:
            logprobs = {token: logprob for logprob, token, _ in tops[step]}
            assert logprobs[a] - logprobs.get(b, -1e9) <= TIE, f"token {step}: {a} became {b}"
            break


def test_openai_completion(server):
    url, _ = server
    body = {"model": "x", "prompt": "import os\nimport ", "max_tokens": 8, "temperature": 0}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] >= 1


def test_packed_weights_are_not_swapped_while_it_serves(server, python_lm_50):
    """SGLang would write the norms, find no weight to write in the projections, and say that it succeeded."""
    url, _ = server
    reply = httpx.post(f"{url}/update_weights_from_disk", json={"model_path": str(python_lm_50)}, timeout=120).json()
    assert not reply["success"]
    assert "sparse-compiled weights are packed" in reply["message"]


def launch(folder, *args):
    """Exit code, output and seconds of a server that cannot start."""
    start = time.monotonic()
    command = [sglang_runner.python(), "-m", "sglang.launch_server", "--model-path", str(folder), *args]
    result = subprocess.run(
        command, env=sglang_runner.environment(), capture_output=True, text=True, timeout=180, check=False
    )
    return result.returncode, result.stdout + result.stderr, time.monotonic() - start


def damaged(source, target, change):
    shutil.copytree(source, target)
    (path,) = target.glob("*.safetensors")
    change(path)
    return target


def truncate(path):
    os.truncate(path, path.stat().st_size - 4096)


def flip_a_value(path):
    with path.open("r+b") as f:
        f.seek(path.stat().st_size * 2 // 3)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("change", [truncate, flip_a_value])
def test_a_damaged_checkpoint_ends_the_server(python_lm_50, tmp_path, change):
    code, text, seconds = launch(damaged(python_lm_50, tmp_path / "damaged", change))
    assert code != 0
    lines = [line for line in text.splitlines() if "CheckpointError: " in line]
    assert lines, text[-3000:]
    assert str(tmp_path) in lines[-1] or "model.layers" in lines[-1], lines[-1]
    # A truncated file is seen before any other process starts; a changed value when it is read.
    assert seconds < 120


REFUSED = [
    (["--speculative-algorithm", "NGRAM"], "--speculative-algorithm NGRAM: the platform sparse_cpu has no speculative"),
    (["--attention-backend", "triton"], "allowed: sparse_cpu, torch_native"),
    (["--sampling-backend", "flashinfer"], "allowed: pytorch"),
    (["--quantization", "fp8"], "allowed: unquant, sparse-compiled"),
    (["--kv-cache-dtype", "fp8_e4m3"], "keeps the cache in the model's dtype"),
    (["--tp-size", "4096"], "4096 ranks (tp_size * dp_size * pp_size) need as many cores"),
]


def test_what_the_platform_cannot_do_is_said_at_the_start(python_lm, tmp_path):
    """In one process, through SGLang's own parsing: each server start would take ten seconds."""
    script = tmp_path / "parse.py"
    script.write_text(
        "import json, sys\n"
        "from sglang.srt.plugins import load_plugins\n"
        "load_plugins()\n"
        "from sglang.srt.server_args import prepare_server_args\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        args = prepare_server_args(arguments)\n"
        "        getattr(args, 'resolve_once', lambda: None)()\n"
        "        print('ACCEPTED', arguments)\n"
        "    except Exception as error:\n"
        "        print('REFUSED', error)\n"
    )
    cases = [["--model-path", str(python_lm), *arguments] for arguments, _ in REFUSED]
    cases.append(["--model-path", str(python_lm), "--attention-backend", "sparse_cpu"])
    command = [sglang_runner.python(), str(script), json.dumps(cases)]
    result = subprocess.run(
        command, env=sglang_runner.environment(), capture_output=True, text=True, timeout=180, check=False
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith(("ACCEPTED", "REFUSED"))]
    assert len(lines) == len(cases), result.stdout + result.stderr[-3000:]
    for line, (arguments, message) in zip(lines, REFUSED, strict=False):
        assert line.startswith("REFUSED"), line
        assert message in line, (arguments, line)
    assert lines[-1].startswith("ACCEPTED"), lines[-1]
