# make setup, demo, up, down, test, long, check, format, chaos: see README.md
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# The run's name and where its result lies: `make demo NAME=other` trains anew.
NAME ?= demo
export SKIPLANE_HOME ?= $(HOME)/.skiplane

GIT_COMMIT = $(shell git rev-parse HEAD 2>/dev/null)
GIT_DIRTY = $(if $(shell git status --porcelain 2>/dev/null),true,false)

.PHONY: setup demo up down test long check format chaos

setup: $(VENV)/.ready

# Again only when the dependency files changed. torch first and alone: its wheel decides between CPU and CUDA.
$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not there; install Python 3.11 or later, or set PYTHON=..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The same commands that a user types (README); `make` only saves typing them.
demo: setup
	@$(BIN)/python -m jobs.pack digits --out $(SKIPLANE_HOME)/data/digits
	@$(BIN)/python -m jobs.local up
	@source $(SKIPLANE_HOME)/local/env.sh && ray job submit --working-dir . \
		--metadata-json '{"git_commit": "$(GIT_COMMIT)", "git_dirty": "$(GIT_DIRTY)"}' -- \
		python -m jobs.study --recipe digits --nets plain-18,plain-34,resnet-18,resnet-34 \
		--name $(NAME) --cluster.storage $(CURDIR)/runs --cluster.workers 2

up: setup
	@$(BIN)/python -m jobs.local up

down: setup
	@$(BIN)/python -m jobs.local down

test: setup
	$(BIN)/python -m pytest

long: setup
	$(BIN)/python -m pytest -m long

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow and not long"

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# N random faults in one run on three hosts, made of this machine's namespaces (Linux, root); about half a minute each.
N ?= 20
SEED ?= 1
chaos: setup
	@$(BIN)/python -m tests.chaos --faults $(N) --seed $(SEED)
