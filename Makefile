# Each target is complete from a fresh clone: what it needs (.venv, the pinned packages, the built
# extension) is made when it is missing or older than what it is made from. Only sdist, wheel and
# gpu-check use what PYTHON has installed: torch and setuptools.

PYTHON ?= python3
ARGS ?=
SECONDS ?= 60
OUT ?= build/gpu-check/report

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
BUILT := build/built

# The CUDA build has its own torch and so its own environment. It needs nvcc and no GPU.
CUDA_VENV := .venv-cuda
CUDA_BIN := $(CUDA_VENV)/bin
CUDA_INSTALLED := $(CUDA_VENV)/installed
CUDA_BUILT := build/cuda-built

# Training frameworks, beside the same torch; they run what is built into .venv, in place.
CLIENTS_VENV := .venv-clients
CLIENTS_BIN := $(CLIENTS_VENV)/bin
CLIENTS_INSTALLED := $(CLIENTS_VENV)/installed

# Sphinx and what it needs; torch and fusedstep are those of .venv.
DOCS_VENV := .venv-docs
DOCS_BIN := $(DOCS_VENV)/bin
DOCS_INSTALLED := $(DOCS_VENV)/installed

PARALLEL := -n auto --maxprocesses 8 --dist worksteal
OPERATOR_TESTS = $(or $(filter tests/%,$(file < tests/operators.txt)),$(error tests/operators.txt lists no tests))
# Every CUDA kernel, on the emulator.
EMULATED = --device emulator $(OPERATOR_TESTS) tests/test_emulator.py tests/test_every_kernel.py
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
# The kernels without Python and torch.
NATIVE := PYTHONPATH=tests $(BIN)/python -m native
SOURCES := $(shell find csrc -type f ! -name '*.md') setup.py pyproject.toml

# The caller's own, also when .venv's python3 comes first on PATH.
override PYTHON := $(or $(shell command -v $(PYTHON)),$(PYTHON))
# The build finds ninja, and tests find tools, by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build train train-ddp test lint format cuda-build cuda-test gpu-check clean distclean clients-test sanitize memcheck fuzz budget bench readme properties test-big errors docs install-matrix sdist wheel

help:  ## list the targets
	@echo 'make TARGET [ARGS="..."] [PYTHON=python3] [OUT=folder] [SECONDS=60]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

build: $(BUILT)  ## build the extension into .venv, in place

train: $(BUILT)  ## train a CNN, native torch beside fusedstep (ARGS="--help" lists the options)
	$(BIN)/python benchmarks/train_cnn.py $(ARGS)

train-ddp: $(BUILT)  ## the same on two processes, with DistributedDataParallel
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 benchmarks/train_ddp.py $(ARGS)

bench: $(BUILT)  ## benchmark and report in build/bench, in minutes (ARGS="--help"; without --quick: over an hour)
	$(BIN)/python benchmarks/run.py $(or $(ARGS),--quick)

readme: $(BUILT)  ## rewrite the measured parts of the pages from committed results
	$(BIN)/python benchmarks/run.py --readme

test: $(BUILT)  ## run the test suite (ARGS="tests/test_sgd.py -k momentum" for a part of it)
ifeq ($(strip $(ARGS)),)
	$(BIN)/pytest $(PARALLEL)
	$(BIN)/pytest $(PARALLEL) $(EMULATED)
else
	$(BIN)/pytest $(PARALLEL) $(ARGS)
endif

clients-test: $(BUILT) $(CLIENTS_INSTALLED)  ## train with Lightning, Accelerate and Transformers
	PYTHONPATH=pyext $(CLIENTS_BIN)/pytest $(PARALLEL) tests/clients

properties: $(BUILT)  ## try new inputs on every property, SECONDS each (ARGS="--device cuda")
	$(BIN)/pytest tests/test_properties.py --explore $(SECONDS) $(ARGS)

test-big: $(BUILT)  ## tensors beyond 2^31 elements and other extremes: up to 13 GB of memory
	$(BIN)/pytest -v -m big tests/test_big.py $(ARGS)

errors: $(BUILT)  ## measure rounding errors beside torch's, into docs/numerics.md
	$(BIN)/python tests/error_measure.py docs/numerics.md

docs: $(BUILT) $(DOCS_INSTALLED)  ## the pages and the API reference, as HTML, into build/docs
	PYTHONPATH="pyext:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	    $(DOCS_BIN)/sphinx-build -W --keep-going -q docs build/docs

sdist:  ## the source distribution, into dist (PYTHON needs torch and setuptools)
	$(PYTHON) -c "import setuptools.build_meta as backend; backend.build_sdist('dist')"

wheel:  ## a wheel for the torch that PYTHON has, into dist
	$(PYTHON) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

install-matrix:  ## install in every way users do (ARGS="--python python3.12 --torch newest"; hours)
	$(PYTHON) tests/install_matrix.py build/install-matrix $(ARGS)

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

sanitize: $(INSTALLED)  ## run the kernels on random arguments under g++'s sanitizers
	$(NATIVE) sanitize $(ARGS)

memcheck: $(INSTALLED)  ## the same under valgrind
	$(NATIVE) memcheck $(ARGS)

fuzz: $(INSTALLED)  ## search for faults with libFuzzer (needs clang; ARGS="--seconds 900 sgd")
	$(NATIVE) fuzz $(ARGS)

budget: $(BUILT)  ## hold instruction counts against their budget (needs valgrind; ARGS=--update)
	$(NATIVE) budget $(ARGS)

cuda-build: $(CUDA_BUILT)  ## build with CUDA into .venv-cuda (needs nvcc, no GPU)

cuda-test: $(CUDA_BUILT)  ## check the CUDA build's machine code, run CPU tests and emulator on it
	$(CUDA_BIN)/python -m fusedstep info
	$(CUDA_BIN)/pytest $(PARALLEL) tests/test_cuda_resources.py tests/test_build.py \
	    $(OPERATOR_TESTS) tests/test_brief.py tests/test_timm.py
	$(CUDA_BIN)/pytest $(PARALLEL) $(EMULATED)

gpu-check:  ## build, test, sanitize and measure on this machine's GPU, with PYTHON's torch, into OUT
	$(PYTHON) tests/gpu/check.py $(OUT)

clean:  ## remove what was built
	rm -rf build dist pyext/*.egg-info pyext/fusedstep/_C*.so pyext/fusedstep/_build_info.py

distclean: clean  ## remove what was built and every .venv
	rm -rf $(VENV) $(CLIENTS_VENV) $(DOCS_VENV) $(CUDA_VENV)

$(INSTALLED): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit( \
	    "fusedstep needs Python 3.10 or newer: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -r $<
	@touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	$(BIN)/pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	@mkdir -p $(@D) && touch $@

$(CLIENTS_INSTALLED): requirements-clients.txt requirements-dev.txt
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_BIN)/pip install --disable-pip-version-check -r $<
	@touch $@

$(DOCS_INSTALLED): requirements-docs.txt $(INSTALLED)
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_BIN)/pip install --disable-pip-version-check -r $<
	@touch $@

# `torch==X` also accepts X+cpu; `torch===X` accepts X alone, which on Linux is the CUDA build.
$(CUDA_INSTALLED): requirements-dev.txt requirements-cuda.txt
	@test -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" || command -v nvcc >/dev/null || \
	    { echo 'The CUDA build needs nvcc: install a CUDA toolkit and put nvcc on PATH.'; exit 1; }
	$(PYTHON) -m venv $(CUDA_VENV)
	sed 's/^torch==/torch===/' $^ > $(CUDA_VENV)/requirements.txt
	$(CUDA_BIN)/pip install --disable-pip-version-check -r $(CUDA_VENV)/requirements.txt
	@touch $@

$(CUDA_BUILT) cuda-test: export PATH := $(CURDIR)/$(CUDA_BIN):$(PATH)
$(CUDA_BUILT): $(CUDA_INSTALLED) $(SOURCES)
	FUSEDSTEP_CUDA=1 TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-7.5;8.0;9.0}" \
	    $(CUDA_BIN)/pip install --disable-pip-version-check --no-build-isolation --no-deps .
	@mkdir -p $(@D) && touch $@
