# Every target works on a fresh clone: it makes .venv with the packages it needs first.
# PYTHON: interpreter that the environment is made from (3.11 or newer).  VENV: its folder, one for each interpreter.
# ARGS: more arguments for the target's command.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
OLDEST := .venv-oldest
# One thread for each pytest worker: more of them fight over the cores.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal --durations=15

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest test-slow lint format bench ablation clean

help:
	@echo "make demo       train on drawn shapes, make masks, score them, write a page of pictures (minutes on 2 cores)"
	@echo "make test       lint, types and tests"
	@echo "make test-oldest  the tests with the oldest versions of all libraries (tests/oldest.txt; Python 3.11)"
	@echo "make test PYTHON=python3.13 VENV=.venv-3.13   the same with another Python, in an environment of its own"
	@echo "make test-slow  the tests that take more than ten seconds each"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff rewrite the files"
	@echo "make bench      speed and memory, side by side with what we compare to"
	@echo "make ablation   the paper's Tables 1 and 2 on drawn shapes, three seeds a row (some 10 minutes on 2 cores)"
	@echo "make clean      remove .venv and caches (runs/ stays)"

demo: $(INSTALLED)
	@$(BIN)/python training/run_all.py --config shapes $(ARGS)

test: lint
	@echo "== tests"
	@$(PYTEST) $(ARGS)

# The extras app and export are tested with the newest versions only.
test-oldest: $(OLDEST)/.installed
	@echo "== tests with the oldest versions"
	@$(PYTEST:$(BIN)/%=$(OLDEST)/bin/%) --ignore=tests/test_app.py --ignore=bitrans_hf/app.py \
		--ignore=tests/test_export.py --ignore=bitrans_hf/publishing/export.py $(ARGS)

$(OLDEST)/.installed: pyproject.toml tests/oldest.txt
	@echo "== installing the oldest versions into $(OLDEST) (once, some minutes: PyTorch is large)"
	@$(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install -c tests/oldest.txt -e '.[coco,crf,sbd,trackers]' \
		hypothesis playwright pytest pytest-xdist
	@touch $@

test-slow: $(INSTALLED_DEV)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow --durations=15 $(ARGS)

lint: $(INSTALLED_DEV)
	@echo "== ruff"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@echo "== mypy"
	@$(BIN)/mypy

format: $(INSTALLED_DEV)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: $(INSTALLED_DEV)
	@$(BIN)/python -m benchmarks $(ARGS)

ablation: $(INSTALLED)
	@$(BIN)/python training/ablate.py --config ablations/paper_tables_shapes --parallel 2 $(ARGS)

clean:
	rm -rf .venv .venv-* build dist .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python {v[0]}.{v[1]} found, 3.11 or newer needed: make PYTHON=/path/to/python3.11 ...")'
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml | $(BIN)/python
	@echo "== installing bitrans-hf and what it needs into $(VENV) (once, some minutes: PyTorch is large)"
	@$(BIN)/python -m pip install -e .
	@touch $@

$(INSTALLED_DEV): pyproject.toml | $(BIN)/python
	@echo "== installing bitrans-hf with the development tools into $(VENV) (once, some minutes: PyTorch is large)"
	@$(BIN)/python -m pip install -e '.[dev]'
	@touch $@ $(INSTALLED)
