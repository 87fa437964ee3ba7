# SPDX-License-Identifier: Apache-2.0
# make demo   sets everything up and runs the demonstration
# make test   sets everything up and runs the tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check
PEERS  := .venv-peers
PEERS_PIP := $(PEERS)/bin/python -m pip --quiet --disable-pip-version-check
# One process of tests per core, up to eight.
WORKERS := $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count() or 1, 8))' 2>/dev/null)
PYTEST := $(BIN)/python -m pytest -n $(or $(WORKERS),1) --dist worksteal
CXX_NAME := $(or $(CXX),c++)

# Caches stay inside the checkout.
export TRITON_CACHE_DIR        := $(CURDIR)/.cache/triton
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor
export MPLCONFIGDIR            := $(CURDIR)/.cache/matplotlib
export HYPOTHESIS_STORAGE_DIRECTORY := $(CURDIR)/.cache/hypothesis

NATIVE := setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp)

.PHONY: build demo test test-all test-alone lint format bench peers report gpu wheel readme clean

build: $(VENV)/.built

demo: build
	$(BIN)/cofire demo

test: build
	$(PYTEST) -m "not full and not gpu"

test-all: lint build
	$(PYTEST) -m "not gpu"

# Of the second tier what no test of the first stands for: a wheel in an empty environment, two processes, the sources of
# CUDA by nvcc, and the check of a GPU without one.
test-alone: build
	$(PYTEST) -m "full and not gpu" $(foreach name,wheel distributed cuda_sources gpu_check,tests/test_$(name).py)

# On a machine with an NVIDIA GPU, in the Python that is there: nothing is installed. Again: goes on where it stopped.
gpu:
	PYTHONPATH=pyextensions:kernels $(PYTHON) -m cofire.gpu_check $(GPU_CHECK)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.cu

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.cu

bench: build
	$(BIN)/cofire bench

# Other libraries to compare with, in an environment of their own: afterwards $(PEERS)/bin/cofire bench. One that cannot be
# installed is said, and the rest go on.
peers: build
	@test -x $(PEERS)/bin/python || { echo "Making $(PEERS) ..."; $(PYTHON) -m venv $(PEERS); }
	@$(PEERS_PIP) install -c constraints.txt torch numpy "setuptools>=77" wheel ninja pybind11
	@COFIRE_BUILD=0 $(PEERS_PIP) install --no-build-isolation -c constraints.txt -e ".[report]"
	@mkdir -p .cache; grep -v '^#' constraints-peers.txt | while read -r peer; do \
	  echo "Installing $$peer ..."; \
	  $(PEERS_PIP) install --no-build-isolation -c constraints.txt "$$peer" </dev/null >.cache/peers.log 2>&1 \
	    || { echo "$$peer cannot be installed here: `grep -v '^ *$$' .cache/peers.log | tail -n 1`"; }; \
	done
	@$(PEERS)/bin/python -m cofire.bench.peers

report: build
	$(BIN)/cofire report

readme: build
	$(BIN)/cofire info --readme README.md
	$(BIN)/cofire report --out docs --readme README.md

# For every CPU of this architecture, not only this one.
wheel: build
	COFIRE_VARIANTS=all $(BIN)/python -m build --no-isolation --wheel --sdist

clean:
	rm -rf build dist .cache report *.egg-info pyextensions/cofire/*.so $(VENV)/.built

$(VENV)/.installed: constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "cofire needs Python 3.10 or newer; '$(PYTHON)' was not found (set PYTHON=...)."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "cofire needs Python 3.10 or newer; $(PYTHON) is `$(PYTHON) -V`."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "cofire needs Python's venv module (on Debian: the package python3-venv)."; exit 1; }
	@command -v $(firstword $(CXX_NAME)) >/dev/null || { echo "cofire needs a C++ compiler; '$(CXX_NAME)' was not found (install g++ or clang++, or set CXX=...)."; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV) ..."; $(PYTHON) -m venv $(VENV); }
	@echo "Installing the pinned packages ..."
	@$(PIP) install -c constraints.txt torch numpy "setuptools>=77" wheel ninja
	@COFIRE_BUILD=0 $(PIP) install --no-build-isolation -c constraints.txt -e ".[dev,data,report]"
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	@echo "Building the C++ kernels ..."
	@mkdir -p .cache; $(BIN)/python setup.py --quiet build_ext --inplace >.cache/build.log 2>&1 || { tail -n 40 .cache/build.log; exit 1; }
	@touch $@
