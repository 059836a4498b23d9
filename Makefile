# make demo       the embedded model under several strategies, side by side
# make test       the tests (under 15 minutes from a fresh clone)
# make test-all   and the slow ones
# make check      format, lint, types
# make strategies-table  every strategy on the embedded model, into the README (an hour; goes on where it was stopped)
# make sglang-cpu       a real SGLang server on the CPU with the embedded model, in the background (PORT=30000)
# make sglang-cpu-stop  end it

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

# Small models are fastest, and steadiest, on one thread.
export OMP_NUM_THREADS ?= 1

# Test processes side by side; a file's tests stay together, and so do all that share a server (tests/conftest.py).
JOBS ?= 2
SIDE_BY_SIDE := -n $(JOBS) --dist loadgroup

.PHONY: demo test test-all check clean strategies-table sglang-cpu sglang-cpu-stop

demo: $(VENV)/.local
	@$(BIN)/orchestra demo

# The tests of servers run against a real SGLang where it can be installed; elsewhere they are skipped, and say so.
test: $(VENV)/.dev
	-@$(MAKE) --no-print-directory $(VENV)/.sglang
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-all: $(VENV)/.dev
	-@$(MAKE) --no-print-directory $(VENV)/.sglang
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not gpu"

strategies-table: $(VENV)/.local
	$(BIN)/python benchmarks/strategies.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

PORT ?= 30000

sglang-cpu: $(VENV)/.local $(VENV)/.sglang
	@$(BIN)/python tools/sglang_cpu/serve.py start --port $(PORT)

sglang-cpu-stop:
	@$(BIN)/python tools/sglang_cpu/serve.py stop

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

# tools/sglang_cpu says why each of these steps is needed.
$(VENV)/.sglang: $(wildcard tools/sglang_cpu/*.txt) constraints.txt $(VENV)/.torch
	@echo "Setting up SGLang for the CPU, once"
	@$(PIP) -r tools/sglang_cpu/requirements.txt
	@$(PIP) --no-deps -r tools/sglang_cpu/no-deps.txt
	@site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])') && \
		printf '%s\nimport torchvision_on_cpu\n' "$(CURDIR)/tools/sglang_cpu" > "$$site/sglang_cpu.pth"
	@touch $@
