# Every target makes the environment it needs first; .venv is made once and then reused.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2 --dist loadfile
BENCH_ARGS ?= --small
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The models of the quickstart and of the tests are tiny: a second thread slows them down.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-vllm check format coverage bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## make the environment (.venv, or VENV=...)

quickstart: $(READY) ## train, distil and evaluate a tiny agent
	@$(BIN)/agentdistill quickstart

test: $(READY) ## run the fast tests (PYTEST_ARGS=... to choose others)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-vllm: $(READY) ## run the tests against a real vLLM server (sets it up: 3.4 GB, once)
	@$(BIN)/agentdistill setup vllm
	@$(BIN)/python -m pytest -m vllm -p no:xdist -s

check: $(READY) ## lint, formatting, types, layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## repair what the linter and the formatter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

coverage: $(READY) ## run the fast tests and say which lines they miss
	@$(BIN)/python -m pytest $(PYTEST_ARGS) --cov

bench: $(READY) ## run every script in benchmarks/, small (BENCH_ARGS= for hours of it)
	@set -e; for script in $$(grep -l '^if __name__' benchmarks/*.py); do \
	  echo "== $$script"; $(BIN)/python "$$script" $(BENCH_ARGS); \
	done

clean: ## remove caches and build outputs (the environment stays)
	rm -rf build dist .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find agentdistill benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# constraints.txt pins torch: another version may bring gigabytes of CUDA along.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "agentdistill needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing into $(VENV); this takes a few minutes the first time."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input \
	  -c constraints.txt -e ".[train,api,envs,serve,vllm,dev]"
	@touch $@
