"""Patched SGLang, imported for real in SGLang's environment: its dependencies, the old version's code."""

from __future__ import annotations

import os
import subprocess

import pytest
import sglang_runner
from conftest import PYTHON_LM
from test_patching import download, install_plugin, unpack

from sparse_backend import patching

CHOICE = """
def register():
    from sglang.srt.server_args import add_quantization_method_choices

    add_quantization_method_choices(["toy"])
"""
METHOD = """
def register():
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    QUANTIZATION_METHODS["toy"] = type("ToyConfig", (Fp8Config,), {})
"""
# 0.5.2's own model code does not import with this environment's sgl_kernel: there only the arguments are tried.
SCRIPT = """
import argparse, multiprocessing, sys

def child(server_args, queue):
    from sglang.srt import server_args as module

    methods = sys.modules.get("sglang.srt.layers.quantization")
    found = methods is not None and "toy" in methods.QUANTIZATION_METHODS
    queue.put(["toy" in module.QUANTIZATION_CHOICES, found, server_args.quantization])

if __name__ == "__main__":
    from sglang.srt.server_args import ServerArgs, prepare_server_args

    line = ["--model-path", sys.argv[2], "--device", "cpu", "--quantization", "toy"]
    if sys.argv[1] == "whole":
        server_args = prepare_server_args(line)
    else:
        parser = argparse.ArgumentParser()
        ServerArgs.add_cli_args(parser)
        server_args = object.__new__(ServerArgs)
        server_args.__dict__.update(vars(parser.parse_args(line)))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(server_args, queue))
    process.start()
    print("child:", *queue.get(timeout=200))
    process.join()
"""


@pytest.mark.parametrize(("version", "plugins"), [("0.5.2", "choice"), ("0.5.10.post1", "choice,method")])
def test_a_plugin_adds_a_quantization_method_in_every_process(version, plugins, tmp_path):
    python = sglang_runner.python()
    site = unpack(download(version, tmp_path), tmp_path / "site")
    patching.patch_engine("sglang", site_packages=site)
    install_plugin(tmp_path / "plugins", "choice", CHOICE)
    install_plugin(tmp_path / "plugins", "method", METHOD)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    whole = "method" in plugins
    result = subprocess.run(
        [python, str(script), "whole" if whole else "arguments", str(PYTHON_LM)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(site), str(tmp_path / "plugins")]),
            "SGLANG_PLUGINS": plugins,
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=400,
    )  # fmt: skip
    # The checkpoint holds no such method: SGLang asked the registered class and went on.
    assert f"child: True {whole} toy" in result.stdout, result.stdout + result.stderr[-4000:]
