# The whole workflow. Needs Python 3.11 or later with venv, make, and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out
STAMP := $(VENV)/.installed
# Two workers were the faster on two cores; JOBS=0 runs in one process.
JOBS ?= 2
PYTEST_ARGS ?=
# `make lowest` installs this torch; TORCH=torch==2.8.0 for the oldest.
TORCH ?= torch
LOWEST := .venv-lowest
LOWEST_TESTS := tests/test_recipe.py tests/test_results.py tests/test_generation.py \
  tests/models/test_load.py tests/models/test_checkpoint.py tests/cli/test_app.py \
  tests/cli/test_generate.py tests/report/test_html.py tests/report/test_plot.py

.PHONY: help setup demo bench test kills lowest check format docs dist clean
.DEFAULT_GOAL := help

help:  ## what the targets do
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 10

setup: $(STAMP)  ## make .venv with pinned versions and install hasten into it

$(STAMP): requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: $(PYTHON) is not Python 3.11 or later' >&2; \
	    echo 'fix: make setup PYTHON=python3.12, or whichever you have' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'error: $(PYTHON) has no venv module' >&2; \
	    echo 'fix: apt-get install python3-venv (Debian/Ubuntu)' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: setup  ## benchmark the bundled model here: table, pictures, report
	$(BIN)/hasten bench --limit 8 --out $(OUT)/demo --overwrite

bench: setup  ## the same with 50 prompts
	$(BIN)/hasten bench --out $(OUT)/bench --overwrite

test: setup  ## run the tests
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

kills: setup  ## kill each command at ten random moments by each signal
	HASTEN_TEST_KILLS=10 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup \
	  tests/cli/test_killed.py $(PYTEST_ARGS)

lowest:  ## run some tests on the oldest dependencies allowed, in .venv-lowest (Python 3.11)
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(PYTHON) tests/lowest_versions.py > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -r $(LOWEST)/requirements.txt $(TORCH) pytest pytest-timeout hypothesis
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	$(LOWEST)/bin/python -m pip check
	$(LOWEST)/bin/python -m pytest -k "not export" $(LOWEST_TESTS) $(PYTEST_ARGS)

check: setup  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## rewrite the sources as check wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## write docs/cli.md from the commands, build the site in site/
	$(BIN)/python docs/make_cli.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: setup  ## build sdist and wheel in dist/ and check them
	@! grep -q 'https://example.com/hasten' pyproject.toml || \
	  { echo 'error: project.urls in pyproject.toml is still a placeholder' >&2; \
	    echo 'fix: put the address of the repository in its place' >&2; exit 1; }
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

clean:  ## remove caches and outputs (not .venv)
	rm -rf out dist build site .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
