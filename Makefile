# make demo       the embedded model under several strategies, side by side
# make test       the tests (under 15 minutes from a fresh clone)
# make test-all   and the slow ones
# make check      format, lint, types

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

# Small models are fastest, and steadiest, on one thread.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all check clean

demo: $(VENV)/.local
	@$(BIN)/orchestra demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not gpu"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: asked for by a looser requirement it would bring gigabytes of CUDA packages.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV), once: torch first, then the rest"
	@$(PIP) torch
	@touch $@

$(VENV)/.local: pyproject.toml setup.py $(VENV)/.torch
	@$(PIP) -e ".[local]"
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py $(VENV)/.torch
	@$(PIP) -e ".[dev,train]"
	@touch $@ $(VENV)/.local
