# make demo and make test are the whole set-up: they create what they need.
PYTHON ?= python3
VENVS  ?= .venv
VLLM   := $(VENVS)/vllm/bin

SGLANG := $(VENVS)/sglang/bin
PRUNE  := $(VENVS)/prune/bin

.PHONY: help env-vllm env-sglang env-prune env-browser demo test test-quick test-asan test-gpu-offline bench lint format clean

help:
	@echo "make demo        serve a pruned model dense and compiled; ends in a table (8 minutes)"
	@echo "make test        all tests, with the real vLLM and SGLang (25 to 40 minutes)"
	@echo "make test-quick  the tests that start no engine (4 minutes)"
	@echo "make test-asan   the C++ under AddressSanitizer and UBSan"
	@echo "make test-gpu-offline  every GPU kernel compiled and its machine code checked, with no GPU (15 minutes)"
	@echo "make bench       kernels, engines, quality against peers, into benchmarks/results"
	@echo "make lint        ruff, mypy, clang-format"
	@echo "make env-vllm    only create $(VENVS)/vllm; VENVS=DIR keeps it elsewhere"
	@echo "make env-sglang  also create $(VENVS)/sglang (11 GB)"
	@echo "make env-prune   also create $(VENVS)/prune: llm-compressor, for method sparsegpt (1.5 GB)"
	@echo "make env-browser install Debian's chromium if no Chromium or Chrome is there (root or sudo)"

env-vllm:
	@$(PYTHON) tools/make_env.py vllm $(VENVS)/vllm

# After env-vllm: both install the one wheel that the first of them builds.
env-sglang: env-vllm
	@$(PYTHON) tools/make_env.py sglang $(VENVS)/sglang

# llm-compressor and vLLM want different versions of compressed-tensors.
env-prune:
	@$(PYTHON) tools/make_env.py prune $(VENVS)/prune

env-browser:
	@$(PYTHON) tools/browser.py --install

demo: env-vllm
	@$(VLLM)/python benchmarks/demo.py

test: env-vllm env-sglang env-prune env-browser
	@SPARSE_BACKEND_TEST_SGLANG=$(abspath $(SGLANG)/python) SPARSE_BACKEND_PRUNE_PYTHON=$(abspath $(PRUNE)/python) \
	    $(VLLM)/python -m pytest

test-quick: env-vllm env-browser
	@$(VLLM)/python -m pytest --ignore=tests/engines

test-asan: env-vllm
	@$(VLLM)/python tools/run_asan.py

# Again with the oldest Triton that is supported, the one of torch 2.11: the few, and every kernel's numbers.
OLDEST_TRITON = 3.6.0
test-gpu-offline: env-vllm
	@$(VLLM)/python tools/gpu_offline.py
	@$(VLLM)/python -m pip install --quiet --no-deps --upgrade --target build/triton-$(OLDEST_TRITON) triton==$(OLDEST_TRITON)
	@PYTHONPATH=build/triton-$(OLDEST_TRITON) $(VLLM)/python tools/gpu_offline.py --quick
	@PYTHONPATH=build/triton-$(OLDEST_TRITON) $(VLLM)/python -m pytest -q tests/gpu/test_interpreted.py

# llama.cpp is a peer: compiled once for this machine, which takes minutes.
bench: env-vllm env-sglang env-prune
	@$(VLLM)/python -m pip install --quiet "$$(ls build/wheel/*.whl)[bench]"
	@$(VLLM)/python benchmarks/kernels.py --save kernels
	@$(VLLM)/python benchmarks/kernels.py --zeros 0.75 --shapes "llama3-8b o" --no-peers --seconds 0.5 \
	    --batch 1 2 3 4 6 8 12 16 24 32 64 128 256 512 --save kernels-batch
	@$(VLLM)/python benchmarks/kernels.py --zeros 0.3 0.4 0.5 0.6 0.7 0.75 0.8 0.85 0.9 0.95 --no-peers \
	    --shapes "llama3-8b gate/up" --batch 1 --seconds 0.5 --save kernels-zeros
	@$(VLLM)/python benchmarks/kernels.py --format ternary --save ternary-kernels
	@$(VLLM)/python benchmarks/engine.py --zeros 0.5 0.9 --save engine
	@$(VLLM)/python benchmarks/engine.py --lowbit --save lowbit-engine
	@$(VLLM)/python benchmarks/planner.py --save planner
	@$(VLLM)/python benchmarks/compiler.py --analyze --compile bitmask --compile ternary --load --save compiler
	@SPARSE_BACKEND_TEST_SGLANG=$(abspath $(SGLANG)/python) $(VLLM)/python benchmarks/engine.py --engine sglang \
	    --save sglang
	@SPARSE_BACKEND_PRUNE_PYTHON=$(abspath $(PRUNE)/python) $(VLLM)/python benchmarks/quality.py --save quality

lint: env-vllm
	@$(VLLM)/ruff check .
	@$(VLLM)/ruff format --check .
	@$(VLLM)/mypy
	@$(VLLM)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')

format: env-vllm
	@$(VLLM)/ruff check --fix .
	@$(VLLM)/ruff format .
	@$(VLLM)/clang-format -i $$(git ls-files '*.cpp' '*.h')

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
