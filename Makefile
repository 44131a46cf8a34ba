# Each target is complete from a fresh clone: what it needs (.venv, the pinned packages, the built
# extension) is made when it is missing or older than what it is made from.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
BUILT := build/built

CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
SOURCES := $(shell find csrc -type f ! -name '*.md') setup.py pyproject.toml

# The build finds ninja, and tests find tools, by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build train test lint format clean distclean

help:  ## list the targets
	@echo 'make TARGET [ARGS="..."] [PYTHON=python3]'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

build: $(BUILT)  ## build the extension into .venv, in place

train: $(BUILT)  ## train a CNN, native torch beside fusedstep (ARGS="--help" lists the options)
	$(BIN)/python benchmarks/train_cnn.py $(ARGS)

test: $(BUILT)  ## run the test suite (ARGS="tests/test_sgd.py -k momentum" for a part of it)
	$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

lint: $(BUILT)  ## check format, lint, types and layering
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layering.py

format: $(INSTALLED)  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

clean:  ## remove what was built
	rm -rf build dist pyext/*.egg-info pyext/fusedstep/_C*.so pyext/fusedstep/_build_info.py

distclean: clean  ## remove what was built and .venv
	rm -rf $(VENV)

$(INSTALLED): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit( \
	    "fusedstep needs Python 3.10 or newer: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -r $<
	@touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	$(BIN)/pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	@mkdir -p $(@D) && touch $@
