# Every target makes what it needs: `make train` on a fresh machine is enough.
PYTHON ?= python3
PY := .venv/bin/python
RUN ?= runs/factbook
ARGS ?=

.PHONY: help train sample plot test lint bench gpu-check clean
.DEFAULT_GOAL := help

help:
	@echo "make train    prepare the World Factbook and train a small GPT-2 on it (8 minutes on 2 cores)"
	@echo "make sample   let it write:  make sample ARGS='--prompt \"Capital:\" --num-samples 3'"
	@echo "make plot     draw its loss and learning rate"
	@echo "make test     lint, and run all tests"
	@echo "make bench    measure speed and quality, beside PyTorch where it is installed"
	@echo "make gpu-check  on a machine with an NVIDIA GPU: all tests, then every kernel and training measured"
	@echo "make clean    remove what was made, but not your runs"
	@echo "RUN=$(RUN) names the run; ARGS=... goes to the script"

PIP = $(PY) -m pip install -q --disable-pip-version-check
OFFLINE = { echo "error: pip could not install the requirements; is the Python package index reachable?"; exit 2; }

.venv/ready: requirements.txt requirements-cuda.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "error: $$($(PYTHON) --version) is not supported; use make PYTHON=python3.10 (up to 3.13)"; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "error: no venv module; on Debian: apt-get install python3-venv"; exit 2; }
	@echo "installing the pinned requirements into .venv"
	@$(PIP) -r requirements.txt || $(OFFLINE)
	@if command -v nvidia-smi >/dev/null; then $(PIP) -r requirements-cuda.txt || $(OFFLINE); fi
	@touch $@

.venv/dev: .venv/ready requirements-dev.txt
	@echo "installing what the tests need"
	@$(PIP) -r requirements-dev.txt || $(OFFLINE)
	@{ command -v g++ || command -v clang++ || command -v c++; } >/dev/null || \
	  $(PIP) ziglang==0.17.1 || $(OFFLINE)  # a C++ compiler, for the emulator
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

lint: .venv/dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

bench: .venv/ready
	$(PY) tests/bench.py $(ARGS)

gpu-check: lint
	@command -v nvidia-smi >/dev/null || { echo "error: no NVIDIA GPU here (nvidia-smi is missing)"; exit 2; }
	@status=0; $(PY) -m pytest || status=1; \
	$(PY) tests/bench_gpu.py --write $(ARGS) || status=1; exit $$status

clean:
	rm -rf .venv cache shards .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
