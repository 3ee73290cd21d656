# The daily commands. `make demo` and `make test` need nothing but a Python with venv: each sets up
# what it needs in $(VENV), again only when pyproject.toml has changed.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# More extras for the tests: those of PyTorch, which is large, run with EXTRAS=torch.
EXTRAS ?=

BIN := $(VENV)/bin
SUM := $(shell cksum < pyproject.toml | cut -d' ' -f1)

.PHONY: help demo test setup lint bench clean
.DELETE_ON_ERROR:
# An installed set of extras; kept although only pattern rules mention it.
.SECONDARY:

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/.demo-$(SUM)  ## Train a controller with a Pool and plot what it learned
	$(BIN)/python examples/evolution.py

# Where there is no Docker engine, Kubernetes cluster (KUBECONFIG) or Slurm cluster (SLURM_CONF), their
# tests are skipped; with FIBER_TEST_ENGINES=docker,kubernetes,slurm they fail instead.
test: lint setup  ## Check style and types, then run the tests (PYTEST_ARGS="-m 'not slow'" for fewer)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

setup: $(VENV)/.test-$(SUM) $(EXTRAS:%=$(VENV)/.%-$(SUM))  ## Install what the tests need

lint: $(VENV)/.test-$(SUM)  ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.bench-$(SUM)  ## Time Fiber and its peers, write benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks

clean:  ## Remove the virtual environment and all caches
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"Fiber needs Python 3.10 or newer; name one with: make PYTHON=/path/to/python3 ...")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	touch $@

# One stamp for each extra and each content of pyproject.toml.
$(VENV)/.%-$(SUM): $(VENV)/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@
