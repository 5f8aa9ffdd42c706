# `make demo` and `make test` each build their own .venv; nothing else needs to be installed.
#
#   PYTHON     interpreter that creates .venv                  make test PYTHON=python3.13
#   ARVIZ      another release of ArviZ, in an environment of its own, .venv-<Python>-arviz<release>:
#              make test PYTHON=python3.13 ARVIZ=1.3.0
#   PIP_FLAGS  extra flags of every `pip install`, for example the index of CPU-only torch builds:
#              make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   ARGS       passed on to `make demo` and to pytest          make unit ARGS="-k schedule"

PYTHON ?= python3
PIP_FLAGS ?=
ARVIZ ?=
ARGS ?=
WORKERS ?= 2

ifeq ($(ARVIZ),)
VENV := .venv
CONSTRAINTS := constraints.txt
else
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv-$(VERSION)-arviz$(ARVIZ)
CONSTRAINTS := $(VENV)/constraints.txt
endif
BIN := $(VENV)/bin
SOURCES := pyproject.toml $(CONSTRAINTS)
CORE := $(VENV)/.installed-examples
DEV := $(VENV)/.installed-dev
PEERS := $(VENV)/.installed-peers
BENCHMARKS := exactness one_algebra discrete training samplers flow sde variances diagnostics digits_flow \
    gaussian_posterior linear_inverse discrete_posterior posterior_programs guide_cost \
    mixture_of_diffusions

# Tests share the cores by processes, so each process computes on one thread.
PYTEST := OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help install lint format typecheck test unit doctest test-examples docs demo bench clean

help:
	@echo "make demo           train, score and sample handwritten digits (results/digits/)"
	@echo "make test           everything that must pass: lint, types, tests, examples, docs"
	@echo "make bench          the package's claims as printed tables"
	@echo "make install        create .venv with all that development needs"
	@echo "make lint | format | typecheck | unit | doctest | test-examples | docs | clean"

# --- environment --------------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: pyro_diffusion needs Python 3.11 or newer;" \
	         "'$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	         "Name another: make PYTHON=/path/to/python3.13 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu install python3-venv." >&2; exit 1; }

# The same pins but for ArviZ's.
$(VENV)/constraints.txt: constraints.txt | $(BIN)/python
	sed 's/^arviz==.*/arviz==$(ARVIZ)/' constraints.txt > $@

# torch first, by its exact version: resolved together with the rest, pip may pick another build.
$(CORE): $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_FLAGS) -c $(CONSTRAINTS) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install $(PIP_FLAGS) -c $(CONSTRAINTS) -e '.[examples]'
	@touch $@

$(DEV): $(CORE)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c $(CONSTRAINTS) \
	    -e '.[examples,tests,docs]'
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps azula==0.11.1
	@touch $@

# azula above and this by themselves: of what they require, their samplers need nothing that is not here.
$(PEERS): $(DEV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c $(CONSTRAINTS) -e '.[benchmarks]'
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps k-diffusion==0.1.1
	@touch $@

install: $(DEV)

# --- checks -------------------------------------------------------------------------------------

test: lint typecheck unit doctest docs

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(DEV)
	$(BIN)/mypy

# tests/test_examples.py is among them: every example, with tiny arguments.
unit: $(DEV)
	$(PYTEST) -n $(WORKERS) tests $(ARGS)

# The plugin gives docstrings the same seed and guards as the tests.
doctest: $(DEV)
	$(PYTEST) -p tests.conftest --doctest-modules pyro_diffusion $(ARGS)

test-examples: $(DEV)
	$(PYTEST) tests/test_examples.py $(ARGS)

# -E: everything anew, as warnings come only from pages that are read.
docs: $(DEV)
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m sphinx -b html -E -W --keep-going -n \
	    docs docs/_build/html

# --- things to look at --------------------------------------------------------------------------

demo: $(CORE)
	$(BIN)/python examples/digits.py $(ARGS)

# One by one, and all of them even if one fails; the exit status tells.
bench: $(PEERS)
	@status=0; for name in $(BENCHMARKS); do \
	    echo "== benchmarks/$$name.py"; \
	    $(BIN)/python benchmarks/$$name.py || status=1; \
	done; exit $$status

clean:
	rm -rf docs/_build build dist .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
