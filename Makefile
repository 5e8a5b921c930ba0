# The commands people type. `make demo` and `make test` set everything up by themselves in a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.DEFAULT_GOAL := help
.PHONY: help setup setup-interplay demo test test-all lint format bench benchmarks clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(INSTALLED)  ## make the virtual environment (.venv) with everything that the other targets need

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("retpop needs Python 3.11 or newer; %s is %s. Try: make PYTHON=python3.11 ..." % (sys.executable, sys.version.split()[0]) if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[atari,minatar,play,scores,test,dev]'
	@touch $@

setup-interplay: $(INSTALLED)  ## add the packages of others that tests/interplay runs with (transformers, PEFT, ...)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[interplay]'
	# Without what it asks for: versions of 2021 and 2022, which RetNet's forward pass does not need.
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps torchscale==0.3.0

demo: $(INSTALLED)  ## train an agent on Atari Breakout for 3 minutes, then let one play that was trained for an hour
	$(BIN)/rem-atari train --preset tiny --env.game Breakout --seed 0 --run $(DEMO_RUN)
	$(BIN)/rem-atari report krull --games 8

# The tests' tensors are tiny: more threads would only wait for each other. So each core gets a process of its own,
# and a file stays in one process, because what its tests share is made once a process. Files come in their order: the
# last ones are short, so that all processes end together.
test test-all: export OMP_NUM_THREADS = 1
WORKERS := --numprocesses=auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder

test: $(INSTALLED)  ## the tests that every change must pass
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not gpu" --cov=retpop --cov-branch --cov-fail-under=95 $(ARGS)

test-all: $(INSTALLED)  ## all tests, the minutes-long ones too
	$(BIN)/python -m pytest $(WORKERS) -m "not gpu" $(ARGS)

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## put the code into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## our own times, for regressions (pytest-benchmark)
	$(BIN)/python -m pytest benchmarks -o python_files=test_speed.py -o addopts='--import-mode=importlib' --benchmark-only $(ARGS)

benchmarks: $(INSTALLED)  ## everything beside others, into benchmarks/results (about 15 minutes), and the page
	$(BIN)/python -m benchmarks run $(ARGS)
	$(BIN)/python -m benchmarks page

clean:  ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
