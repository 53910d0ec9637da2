# The two commands of the README are `make demo` and `make test`. Each makes .venv, installs, builds and runs.
#
#   TORCH   the torch to install first, e.g. TORCH="torch==2.11.0 --index-url ..." for a CUDA build; with a CUDA toolkit
#           beside it the CUDA kernels are built as well
#   PYTHON  the interpreter that makes .venv (3.10 or newer)

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f)
FORMATTED := $(filter %.h %.cpp %.cuh %.cu,$(SOURCES)) $(wildcard tests/cpp/*.cpp tests/emulation/* tests/gates/*.cu)

.PHONY: help demo test install lint format types docs bench bench-gate cpp clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make demo        draw scenes, train SCAN on them, evaluate, show the attention
demo: $(VENV)/.installed
	$(BIN)/itm demo

## make test        the test suite
test: $(VENV)/.installed
	$(BIN)/python -m pytest

## make install     .venv with everything, the native library built
install: $(VENV)/.installed

# torch first: an extension is built against the torch that is there, and without isolation pip fetches no second one.
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "itm_kernels needs Python 3.10 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet numpy ninja "pybind11>=2.13"
	@touch $@

# A torch with CUDA brings the one Triton it works with; beside any other the tests need one to interpret with.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	extras=$$($(BIN)/python -c 'import torch; print("dev" if torch.version.cuda else "dev,interpreter")') && \
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[$$extras]"
	@touch $@

## make lint        ruff, clang-format: rules and format
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

## make format      put the code into that format
format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

## make types       mypy, strict on itm_kernels
types: $(VENV)/.installed
	$(BIN)/mypy

## make docs        the documentation, warnings are errors
docs: $(VENV)/.installed
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

## make bench       time the ops on this machine's CPU
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.run --device cpu

## make bench-gate  the performance gates: ratios to a bare product in the same process
bench-gate: $(VENV)/.installed
	$(BIN)/python -m pytest --benchmark-only tests/benchmarks

## make cpp         configure with CMake, build and run the C++ tests (needs cmake)
cpp: $(VENV)/.installed
	cmake -S . -B build/cmake -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	cmake --build build/cmake
	ctest --test-dir build/cmake --output-on-failure

clean:
	rm -rf build *.egg-info docs/_build itm_kernels/native/*.so
