# Every target makes what it needs: `make train` on a fresh machine is enough.
PYTHON ?= python3
PY := .venv/bin/python
RUN ?= runs/factbook
ARGS ?=

.PHONY: help train sample plot test lint bench clean
.DEFAULT_GOAL := help

help:
	@echo "make train    prepare the World Factbook and train a small GPT-2 on it (8 minutes on 2 cores)"
	@echo "make sample   let it write:  make sample ARGS='--prompt \"Capital:\" --num-samples 3'"
	@echo "make plot     draw its loss and learning rate"
	@echo "make test     lint, and run all tests"
	@echo "make bench    measure speed and quality, beside PyTorch where it is installed"
	@echo "make clean    remove what was made, but not your runs"
	@echo "RUN=$(RUN) names the run; ARGS=... goes to the script"

.venv/ready: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "error: $$($(PYTHON) --version) is not supported; use make PYTHON=python3.10 (up to 3.13)"; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "error: no venv module; on Debian: apt-get install python3-venv"; exit 2; }
	@echo "installing the pinned requirements into .venv"
	@$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt || \
	  { echo "error: pip could not install the requirements; is the Python package index reachable?"; exit 2; }
	@{ command -v g++ || command -v clang++ || command -v c++; } >/dev/null || \
	  $(PY) -m pip install -q --disable-pip-version-check ziglang==0.17.1  # a C++ compiler, for the emulator
	@touch $@

shards/factbook: | .venv/ready
	$(PY) data.py factbook --out $@

train: .venv/ready | shards/factbook
	$(PY) train.py --out $(RUN) $(if $(wildcard $(RUN)/step_*),--resume) $(ARGS)

sample: .venv/ready
	@$(PY) sample.py $(RUN) $(ARGS)

plot: .venv/ready
	@$(PY) plot.py $(RUN) $(ARGS)

test: lint
	$(PY) -m pytest

lint: .venv/ready
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

bench: .venv/ready
	$(PY) tests/bench.py $(ARGS)

clean:
	rm -rf .venv cache shards .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
