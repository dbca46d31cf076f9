# Each target does what it needs of the earlier ones. ARGS reaches the command: make test ARGS="-k shape".
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench soak clean

help:
	@echo "make setup   create $(VENV) with everything that development needs"
	@echo "make demo    train a small model on four processes, lose one, go on (programs/train.py)"
	@echo "make test    run the tests"
	@echo "make check   lint, formatting, types"
	@echo "make format  apply the formatter and the linter's safe fixes"
	@echo "make bench   measure the runtime beside its limits"
	@echo "make soak    run the tests that take minutes"
	@echo "make clean   remove $(VENV), caches and builds"
	@echo "variables: PYTHON=$(PYTHON) (3.11 or newer), VENV=$(VENV), ARGS=\"...\" for the command"

setup: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "danaus needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@echo "setup: creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no venv module: install python3-venv, or set PYTHON"; exit 1; }

# torch comes first and pinned: a range would let another package choose its newest build.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "setup: installing torch"
	@$(PIP) torch
	@echo "setup: installing danaus and its development tools"
	@$(PIP) --editable '.[torch,train,dev]'
	@mkdir -p $(VENV)/typing
	@ln -sfn "$(CURDIR)" $(VENV)/typing/danaus
	@touch $@

demo: setup
	$(BIN)/python -m danaus.programs.train --kill-rank-at 120 $(ARGS)

# Kernels keep one core busy for minutes, most of the rest waits: two runs side by side take little longer than one of them.
APART := tests/kernels tests/runtime/bulk tests/runtime/jobs tests/runtime/workspace tests/tools/test_job.py \
	tests/tools/test_job_remote.py tests/tools/test_run_spmd.py

# A shell has what it runs in the background ignore SIGINT, which tests send.
INTERRUPTIBLE := import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])

test: setup
ifeq ($(strip $(ARGS)),)
	@$(BIN)/python -c '$(INTERRUPTIBLE)' $(BIN)/python -m pytest $(APART) > $(VENV)/apart.log 2>&1 & apart=$$!; \
	$(BIN)/python -m pytest $(addprefix --ignore=,$(APART)); rest=$$?; \
	wait $$apart; code=$$?; echo "== $(APART)"; cat $(VENV)/apart.log; \
	[ $$rest -eq 0 ] && [ $$code -eq 0 ]
else
	$(BIN)/python -m pytest $(ARGS)
endif

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/danaus bench $(ARGS)

soak: setup
	$(BIN)/python -m pytest -m soak $(ARGS)

clean:
	rm -rf $(VENV) build dist danaus.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
