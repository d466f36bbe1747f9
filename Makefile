PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes of one thread: more would only fight over the cores. A file stays in one, with what its tests share; the
# folders of long files come first, so that neither process is left with one at the end.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
SUITE := tests/distributed tests/e2e tests/reliability tests/chaos tests/numerics tests/cli tests/unit

.DEFAULT_GOAL := help
.PHONY: help setup run test chaos check bench bench-full format config-docs clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## Make .venv with the tested versions

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

run: setup ## Train the embedded quickstart model and score it, base against tuned
	$(BIN)/dude train configs/quickstart.yaml --overwrite
	$(BIN)/dude eval runs/quickstart --base

test: setup ## Run every test; real data is found through DUDE_TEST_DATA
	$(PYTEST) $(SUITE)

chaos: setup ## The long form of tests/chaos: kills, signals, fuzzing; up to an hour
	DUDE_CHAOS=long OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/chaos

check: setup ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

config-docs: setup ## Write docs/config.md from the schema
	$(BIN)/python tools/config_reference.py docs/config.md

# One after another: two at once would time each other. Another benchmark is another name here.
BENCHMARKS := layer step memory growth decomposition

bench: setup ## The short benchmarks beside PEFT, interleaved: ten minutes on two cores
	set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --short; done

bench-full: setup ## The CPU benchmarks in full, in two hours, and the tables of docs/performance.md
	set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py; done
	$(BIN)/python benchmarks/page.py

clean: ## Delete what the other targets made, the runs excepted
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
