# Every target makes what it needs: `make train` on a fresh machine is enough.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: test lint clean
.DEFAULT_GOAL := help

.venv/ready: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "error: $$($(PYTHON) --version) is not supported; use make PYTHON=python3.10 (up to 3.13)"; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "error: no venv module; on Debian: apt-get install python3-venv"; exit 2; }
	@echo "installing the pinned requirements into .venv"
	@$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt || \
	  { echo "error: pip could not install the requirements; is the Python package index reachable?"; exit 2; }
	@touch $@

test: lint
	$(PY) -m pytest

lint: .venv/ready
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
