# Everything starts here: `make workbook`, `make check` and `make test` each set up what they need on a machine that has
# Python 3.11 or newer, pip and make. Set-up lives in .venv and is redone when pyproject.toml changes.

# The Python that .venv is made from.
PYTHON ?= python3
# Optional address of a package index with other builds of torch. On Linux the default build brings CUDA
# and several gigabytes; an index of CPU builds makes set-up small: make test TORCH_INDEX=<address>
TORCH_INDEX ?=
# Fetches the bundled model into the user's cache; does nothing when it is there.
FETCH ?= $(PY) -m hat_lib setup --quiet
# Files or folders whose tests `make check` runs: make check ONLY=tests/method; all by default.
ONLY ?=
# What `make soak` runs: equalities, paths, bases, kills, leaks or busy; all by default.
PART ?=
# Processes that tests run in, of one thread each. A file's tests stay together.
JOBS ?= 2

PY := .venv/bin/python
TORCH := torch>=2.8,<3
# Named file by file, the longest first, or one process would wait for the other at the end: of a folder and a file in
# it, pytest takes the folder's order.
LONGEST := tests/workbook/test_browser.py
TESTS := $(LONGEST) $(filter-out $(LONGEST),$(sort $(wildcard tests/test_*.py tests/*/test_*.py)))
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST := OMP_NUM_THREADS=1 $(OFFLINE) $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
# The one that trains routers takes the longest of all; `make workbook` runs it.
COMPARED := $(filter-out notebooks/03_%,$(wildcard notebooks/*.ipynb))
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with notebooks/nbval_sanitize.cfg --nbval-cell-timeout 300

# Where torch is held to plainer kernels, oneDNN must be, too: else flash attention in bf16 packs for AMX and fails
# ("pack_vnni2 is only supported when avx512 is supported", torch 2.13 on a CPU with AMX).
ifdef ATEN_CPU_CAPABILITY
export ONEDNN_MAX_CPU_ISA ?= AVX2
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup workbook check test nbval soak refresh book lint clean

help:  ## say what each target does
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

workbook: .venv/ready  ## run every notebook into runs/, then say how each one went
	$(OFFLINE) $(PY) -m hat_lib.workbook run

check: lint  ## lint, and every test that is not marked slow: about two minutes
	$(PYTEST) -m "not slow" $(ONLY)

test: lint  ## lint, every test, and stored outputs of the notebooks (but 03) compared with a fresh run
	$(PYTEST) $(TESTS)
	$(MAKE) nbval

nbval: .venv/tested  ## only compare the notebooks' stored outputs (but 03) with a fresh run
	$(if $(COMPARED),$(PYTEST) $(NBVAL) $(COMPARED),@echo "no notebooks to compare")

soak: .venv/tested  ## random models, also off the beaten path, kills, memory over many texts, busy machines: half an hour
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(OFFLINE) $(PY) -m soak $(PART)

refresh: .venv/tested  ## make what is stale anew: results, tables, figures, notebooks; hours, resumable, on an idle machine
	$(OFFLINE) $(PY) -m studies --all --again --stale --out data/results
	$(PY) -m studies --tables
	$(PY) -m studies --figures
	$(OFFLINE) $(PY) -m hat_lib.workbook execute

book: .venv/booked  ## build the site into build/book; a broken link fails
	rm -rf build/book
	$(PY) -m sphinx -c docs -d build/doctrees -EWq . build/book
	@echo "build/book/index.html"

lint: .venv/tested
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports --no-cache

setup: .venv/ready  ## only set up: .venv, the packages, the bundled model

clean:  ## remove .venv, caches and build leftovers; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find hat_lib tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "This project needs Python 3.11 or newer, and '$(PYTHON)' is not one." \
	    "Name another: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "'$(PYTHON)' lacks its venv module. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv

.venv/ready: pyproject.toml | .venv/bin/python
	$(if $(TORCH_INDEX),$(PY) -m pip install --index-url "$(TORCH_INDEX)" "$(TORCH)")
	$(PY) -m pip install -e ".[workbook,dev]"
	$(FETCH)
	@touch $@

# What only tests need: lm-evaluation-harness is 200 MB, Triton a gigabyte, and no notebook imports them.
.venv/tested: pyproject.toml | .venv/ready
	$(PY) -m pip install -e ".[workbook,dev,eval,gpu]"
	@touch $@

.venv/booked: pyproject.toml | .venv/ready
	$(PY) -m pip install -e ".[book]"
	@touch $@
