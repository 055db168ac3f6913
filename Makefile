# All targets use .venv; the first one that needs it creates it. ARGS="key=value ..." passes overrides.
# Another build of torch: UV_TORCH_BACKEND=cpu make train   (or cu128, rocm6.4, ...; see uv's --torch-backend)

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: setup train test test-fast test-slow test-cuda torture bench check format lock clean

setup: .venv/.ready

# The pins are constraints: a package that this platform or build of torch does not need is not installed.
# Bytecode is compiled here, so that the first start is seconds faster.
.venv/.ready: pyproject.toml requirements.lock
	@echo "Installing pinned packages into .venv: about 2 minutes, and 6 GB of disk with CUDA libraries."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check "uv==0.13.8"
	@$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --constraint requirements.lock --editable ".[dev]"
	@touch $@

train: setup
	@$(BIN)/python scripts/train.py $(ARGS)

# Two processes; each runs whole test files, so that fixtures shared within a file are created once.
PYTEST := $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

test: setup
	@$(PYTEST) $(ARGS)

test-fast: setup
	@$(PYTEST) -m "not slow and not cuda and not timing and not thorough" $(ARGS)

test-slow: setup
	@$(BIN)/python -m pytest -m "slow and not cuda" $(ARGS)

test-cuda: setup
	@$(BIN)/python -m pytest -m "cuda or not cuda" tests/test_cuda.py $(ARGS)
	@$(BIN)/python -m pytest -m cuda tests/test_matrix.py $(ARGS)

# Installs Lightning and fastai; only the benchmarks use them.
bench: setup
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable ".[dev,bench]"
	@$(BIN)/python -m pytest -m timing
	@$(BIN)/python bench/bench.py $(ARGS)

# Tests of the guarantees in docs/reliability.md, at full size; prints a table of their measurements.
torture: setup
	@$(BIN)/python -m pytest --full -m "not slow and not cuda" tests/test_durability.py tests/test_kills.py tests/test_matrix.py tests/test_finite.py \
		tests/test_fuzz.py tests/test_security.py tests/test_workers.py tests/test_bad_data.py tests/test_cost.py \
		tests/test_sweeps.py $(ARGS)

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_structure.py tests/test_word_list.py

format: setup
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# Updates the pins for all platforms; the lock file names no package index.
lock: setup
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-header --no-annotate --no-emit-index-url \
		--upgrade --output-file requirements.lock pyproject.toml

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
