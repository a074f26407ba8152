# Two commands do everything on a fresh machine: `make train` and `make test`.  Each sets itself up in .venv, once.

PYTHON  ?= python3
WORKDIR ?= runs/ring_tiny
CONFIG  ?= configs/ring_tiny.py
VENV    := .venv
RUN     := $(VENV)/bin/python
PYTEST  := $(RUN) -m pytest -n 2 --dist worksteal
# Tests that spend their time in XLA and not in what it makes: compiled without optimisation, and by XLA's older code for
# fusions, they take half the time.  All others run what a user's command would.
COMPILE_BOUND := tests/kernels tests/model tests/train/test_programs.py tests/train/test_scalar_programs.py tests/train/test_switching.py \
  tests/rollout/test_probe.py tests/rollout/test_engine.py tests/rollout/test_paged.py tests/launch/test_score.py tests/studies/test_quick.py
QUICK_TO_COMPILE := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false

# The toy runs are for the CPU, also on a machine that has an accelerator: JAX_PLATFORMS= make train takes that one.
export JAX_PLATFORMS ?= cpu
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
# glibc returns large buffers to the kernel at once and then faults their pages in again, step after step; keeping them
# saves up to a quarter of a training step on the CPU.
export MALLOC_TOP_PAD_ ?= 268435456
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824
# Large pages for them: an eighth less processor time in the tiny run (docs/speed.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: train think rlhf test test-tpu test-gpu test-pods parity lint bench clean help

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

train: $(VENV)/train.stamp  ## train the tiny Ring by SFT and RL (about 2 minutes on 2 cores); resumes where it stopped
	$(RUN) -m ring_jax.launch.train --config=$(CONFIG) --workdir=$(WORKDIR)

think: $(VENV)/train.stamp  ## the same with a reasoning trace inside <think>, on arithmetic (about 4 minutes)
	$(MAKE) train CONFIG=configs/ring_tiny_think.py WORKDIR=runs/ring_tiny_think

rlhf: $(VENV)/train.stamp  ## the whole pipeline: SFT, RL, a reward model, then PPO with actor, critic, reference and reward (about 4 minutes)
	$(MAKE) train CONFIG=configs/ring_tiny_rlhf.py WORKDIR=runs/ring_tiny_rlhf

test: $(VENV)/test.stamp  ## all tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	failed=0; \
	XLA_FLAGS="$(XLA_FLAGS) $(QUICK_TO_COMPILE)" $(PYTEST) $(COMPILE_BOUND) || failed=1; \
	$(PYTEST) $(COMPILE_BOUND:%=--ignore=%) tests || failed=1; \
	exit $$failed

test-tpu: $(VENV)/test.stamp  ## the kernels at real shapes, by the TPU compiler for every chip (no TPU needed)
	$(PYTEST) -m "tpu or tpu_full" tests

# Each program in a process of its own: the compiler keeps the memory that it took.
test-pods: $(VENV)/test.stamp  ## Ring-mini, Ring-flash and Ring-1T compiled whole for their pods, by the TPU compiler (no TPU needed)
	$(RUN) -m pytest -o addopts= --import-mode=importlib --collect-only -q -m pods tests | grep :: \
	  | xargs -r -d '\n' -P 2 -n 1 $(RUN) -m pytest -m pods

# JAX's plugin for CUDA is installed beside the rest; tests share the card, so that none may take all of its memory.
test-gpu: $(VENV)/gpu.stamp  ## the kernels' tests, and parity with PyTorch, on an NVIDIA GPU (needs one)
	JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTEST) -m "not cpu and not tpu and not tpu_full" \
	  $(addprefix tests/kernels/test_,precision.py grouped_matmul.py attention.py attention_decode.py linear_logprob.py linear_sample.py)
	JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false $(RUN) -m parity.run --suite=model
	JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false $(RUN) -m parity.run --suite=objective

parity: $(VENV)/test.stamp  ## compare with PyTorch, transformers and vLLM; the report is parity_report/report.html
	$(RUN) -m parity.run --suite=all --report=parity_report

bench: $(VENV)/train.stamp  ## the benchmarks of kernels and weight transfer
	$(RUN) -m kernels.grouped_matmul.bench
	$(RUN) -m kernels.linear_logprob.bench
	$(RUN) -m kernels.attention.bench
	JAX_NUM_CPU_DEVICES=8 $(RUN) -m sharding.transfer.bench

lint: $(VENV)/test.stamp  ## format, and mend what can be mended
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/train.stamp: requirements/train.txt requirements/no_deps.txt setup.py | $(VENV)/bin/python
	$(VENV)/bin/pip install -q -r requirements/train.txt
	$(VENV)/bin/pip install -q --no-deps -r requirements/no_deps.txt
	$(VENV)/bin/pip install -q --no-deps -e .
	touch $@

$(VENV)/test.stamp: requirements/test.txt requirements/vllm.txt requirements/tpu_compiler.txt $(VENV)/train.stamp
	$(VENV)/bin/pip install -q -r requirements/test.txt
	$(VENV)/bin/pip install -q --no-deps -r requirements/vllm.txt
	$(VENV)/bin/pip install -q --no-deps --upgrade --target $(VENV)/tpu_compiler -r requirements/tpu_compiler.txt
	touch $@

$(VENV)/gpu.stamp: requirements/gpu.txt $(VENV)/test.stamp
	$(VENV)/bin/pip install -q -r requirements/gpu.txt
	touch $@
