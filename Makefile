# Every target makes what it needs: `make train` on a fresh machine is enough.
PYTHON ?= python3
PY := .venv/bin/python
ARGS ?=

# What to train: tiny on a laptop. On a machine with a GPU train.py looks at the cards and the disk and chooses.
# MODEL=d12 asks for a larger model; once its training begins, runs/model keeps which it is for the other targets.
GPU := $(shell command -v nvidia-smi 2>/dev/null)
MODEL ?= $(if $(wildcard runs/model),$(shell cat runs/model))
ifeq ($(MODEL)$(GPU),)
MODEL := tiny
endif
DATA ?= fineweb
RUN ?= runs/$(if $(filter-out tiny,$(MODEL)),$(MODEL),factbook)
SIZE := $(patsubst %,-%,$(filter-out tiny,$(MODEL)))
SFT ?= runs/sft$(SIZE)
RL ?= runs/rl$(SIZE)
RLHF ?= runs/rlhf$(SIZE)
SEED ?= 42
# What the first assistant learns from: the facts above all, since the second is taught only those that it
# knows; and what every other skill is made of, to copy and to calculate.
FACTS := factbook=32,sums=2,repeat=8,tools=20,tasks=9,spelling=7,counting=6,identity=11,chitchat=6,unknown=2
# What the second assistant learns on a base of GPT-2's size, after a first that learned to chat (sft.py's recipe):
# calculations and our own skills. Others found that what is learned last stays.
SKILLS := gsm8k:hub=28,tools=15,spelling=10,counting=5,identity=5,refusal=2,unknown=3,smoltalk:hub=32
# What the tiny model practises; a larger one practises what rl.py's recipe says, GSM8K.
PROBLEMS := $(if $(filter-out tiny,$(MODEL)),,--task word,arithmetic --level 1-4 --steps 300)

.PHONY: help driver train sample sft chat chat-web rl rlhf experiments plot figures test lint bench gpu-check clean
.DEFAULT_GOAL := help

help:
	@echo "make train    prepare the World Factbook and train a small GPT-2 on it (9 to 18 minutes on 2 cores);"
	@echo "              with a GPU: download FineWeb and train GPT-2 on it. MODEL=tiny, d12, d24 says which,"
	@echo "              DATA=fineweb-edu takes pages that teach something"
	@echo "make sample   let it write:  make sample ARGS='--prompt \"Capital:\" --num-samples 3'"
	@echo "make sft      make an assistant of it, with tools (8 to 35 minutes), and evaluate it"
	@echo "make chat     talk to the assistant; make chat-web: in the browser"
	@echo "make rl       let it practise problems whose answers can be checked (3 to 9 minutes)"
	@echo "make rlhf     let it learn to please a reward model, and to fool it (3 to 8 minutes)"
	@echo "make experiments  answer some questions of the lecture, a table and a figure each (half an hour)"
	@echo "make plot     draw its loss and learning rate"
	@echo "make figures  draw the figures of the README from the runs of these"
	@echo "make test     lint, and run all tests"
	@echo "make bench    measure speed and quality, beside PyTorch where it is installed"
	@echo "make gpu-check  on a machine with an NVIDIA GPU: every kernel tested, then every kernel and training measured"
	@echo "make clean    remove what was made, but not your runs"
	@echo "RUN=$(RUN), SFT=$(SFT), RL=$(RL) and RLHF=$(RLHF) name the runs; ARGS=... goes to the script"

PIP = $(PY) -m pip install -q --disable-pip-version-check
OFFLINE = { echo "error: pip could not install the requirements; is the Python package index reachable?"; exit 2; }

.venv/ready: requirements.txt requirements-cuda.txt requirements-cuda12.txt requirements-hub.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' || \
	  { echo "error: $$($(PYTHON) --version) is not supported; use make PYTHON=python3.10 (up to 3.14)"; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "error: no venv module; on Debian: apt-get install python3-venv"; exit 2; }
	@echo "installing the pinned requirements into .venv"
	@$(PIP) -r requirements.txt || $(OFFLINE)
	@$(if $(GPU),$(MAKE) --no-print-directory driver)
	@touch $@

# CuPy and NVRTC for the driver that is there: nvidia-smi names the newest CUDA that it can run.
driver:
	@version=$$(nvidia-smi | sed -n 's/.*CUDA[A-Z ]* Version: *\([0-9.]*\).*/\1/p'); \
	case "$$version" in \
	  "") echo "note: nvidia-smi finds no working driver; going on without a GPU"; exit 0 ;; \
	  ?.* | 1[01].*) echo "error: the GPU's driver can run CUDA $$version, 12.0 is the oldest we know; update the driver"; exit 2 ;; \
	  12.*) file=requirements-cuda12.txt; echo "CuPy for CUDA 12, because the driver is from CUDA $$version (CUDA 13: driver 580)" ;; \
	  *) file=requirements-cuda.txt; echo "CuPy for CUDA 13, because the driver can run CUDA $$version" ;; \
	esac; \
	$(PIP) -r $$file -r requirements-hub.txt || $(OFFLINE)

.venv/dev: .venv/ready requirements-dev.txt requirements-gym.txt requirements-hub.txt requirements-clean.txt
	@echo "installing what the tests need"
	@$(PIP) -r requirements-dev.txt || $(OFFLINE)
	@$(PIP) -r requirements-gym.txt || echo "note: no reasoning-gym (a C compiler?); its tests will be skipped"
	@{ command -v g++ || command -v clang++ || command -v c++; } >/dev/null || \
	  $(PIP) ziglang==0.17.1 || $(OFFLINE)  # a C++ compiler, for the emulator
	@touch $@

shards/factbook: | .venv/ready
	@mkdir -p shards
	$(PY) -m tasks.conversations sums=3,tasks=2,repeat=5 --num 12000 --workbook shards/workbook.jsonl
	$(PY) data.py factbook --train-also shards/workbook.jsonl --out $@

ifeq ($(MODEL),tiny)
train: .venv/ready | shards/factbook
	$(PY) train.py --out $(RUN) $(if $(wildcard $(RUN)/step_*),--resume) $(ARGS)
else ifneq ($(MODEL),)
# Exit status 69: there is no connection to the hub.
train: .venv/ready
	@$(PY) data.py $(DATA) --out shards/$(DATA); status=$$?; \
	if [ $$status = 69 ]; then echo "training the tiny model on the World Factbook instead"; \
	  exec $(MAKE) --no-print-directory train MODEL=tiny; fi; \
	[ $$status = 0 ] || exit $$status; \
	mkdir -p runs && echo $(MODEL) >runs/model; \
	exec $(PY) train.py --model $(MODEL) --data shards/$(DATA) --out $(RUN) $(if $(wildcard $(RUN)/step_*),--resume) $(ARGS)
else
train: .venv/ready
	@model=$$($(PY) train.py --choose) && exec $(MAKE) --no-print-directory train MODEL=$$model
endif

sample: .venv/ready
	@$(PY) sample.py $(RUN) $(ARGS)

ifeq ($(filter-out tiny,$(MODEL)),)
# Twice: what the first assistant turns out not to know, the second learns to say that it does not know.
sft: .venv/ready
	@ls $(RUN)/step_* >/dev/null 2>&1 || $(MAKE) train MODEL=tiny ARGS=
	@test -e $(SFT)-first/done || { $(PY) sft.py --init-from $(RUN) --out $(SFT)-first --data $(FACTS) \
	  --examples 62000 --seed $(SEED) $(if $(wildcard $(SFT)-first/step_*),--resume) && touch $(SFT)-first/done; }
	@test -e $(SFT)-first/known.jsonl || $(PY) evaluate.py $(SFT)-first --probe $(SFT)-first/known.jsonl --seed $(SEED)
	@test -e $(SFT)/done || { $(PY) sft.py --init-from $(SFT)-first --out $(SFT) --examples 75000 \
	  --known $(SFT)-first/known.jsonl --seed $(SEED) $(if $(wildcard $(SFT)/step_*),--resume) $(ARGS) && touch $(SFT)/done; }
	$(PY) evaluate.py $(SFT) --known $(SFT)-first/known.jsonl
else
sft: .venv/ready
	@ls $(RUN)/step_* >/dev/null 2>&1 || $(MAKE) train ARGS=
	@test -e $(SFT)-first/done || { $(PY) sft.py --init-from $(RUN) --out $(SFT)-first --skip-bad \
	  --seed $(SEED) $(if $(wildcard $(SFT)-first/step_*),--resume) && touch $(SFT)-first/done; }
	@test -e $(SFT)/done || { $(PY) sft.py --init-from $(SFT)-first --out $(SFT) --data $(SKILLS) --skip-bad \
	  --examples 24000 --epochs 3 --lr 1e-4 --warmup-steps 50 --seed $(SEED) \
	  $(if $(wildcard $(SFT)/step_*),--resume) $(ARGS) && touch $(SFT)/done; }
	$(PY) evaluate.py $(SFT) --task gsm8k:hub --problems 1319 --max-tokens 256
endif

chat: .venv/ready
	@$(PY) sample.py $(SFT) --chat $(ARGS)

chat-web: .venv/ready
	@$(PY) -m extras.serve $(SFT) $(ARGS)

rl: .venv/ready
	@test -e $(SFT)/done || $(MAKE) sft ARGS=
	$(PY) rl.py --init-from $(SFT) --out $(RL) $(PROBLEMS) \
	  --seed $(SEED) $(if $(wildcard $(RL)/step_*),--resume) $(ARGS)

# Conversations in different manners, an assistant that has them, a reward model of what people prefer, and the
# policy that makes the reward large.
rlhf: .venv/ready
	@test -e $(SFT)/done || $(MAKE) sft ARGS=
	@test -e $(RLHF)-manners.jsonl || \
	  $(PY) -m extras.rlhf manners --init-from $(SFT) --out $(RLHF)-manners.jsonl --seed $(SEED)
	@test -e $(RLHF)-manners/done || { $(PY) sft.py --init-from $(SFT) --data jsonl:$(RLHF)-manners.jsonl \
	  --out $(RLHF)-manners --batch-size 16 --seed $(SEED) $(if $(wildcard $(RLHF)-manners/step_*),--resume) && \
	  touch $(RLHF)-manners/done; }
	@test -e $(RLHF)-reward/done || { $(PY) -m extras.rlhf reward --init-from $(RLHF)-manners \
	  --out $(RLHF)-reward --seed $(SEED) $(if $(wildcard $(RLHF)-reward/step_*),--resume) && \
	  touch $(RLHF)-reward/done; }
	$(PY) -m extras.rlhf policy --init-from $(RLHF)-manners --out $(RLHF) --reward-model $(RLHF)-reward --std \
	  --seed $(SEED) $(if $(wildcard $(RLHF)/step_*),--resume) $(ARGS)
	$(PY) -m extras.plot $(RLHF)

# They need what make train, sft and rlhf have made. ARGS=--quick is for a look at what they do.
EXPERIMENTS := base_model scaling_law tokens_to_think collapse test_time think_longer preferences
experiments: .venv/ready | shards/factbook
	@ls $(RLHF)-manners/step_* >/dev/null 2>&1 || $(MAKE) rlhf MODEL=tiny ARGS=
	@for name in $(EXPERIMENTS); do echo "experiments/$$name.py"; $(PY) -m experiments.$$name $(ARGS) || exit; done

plot: .venv/ready
	@$(PY) -m extras.plot $(RUN) $(ARGS)

figures: .venv/ready
	$(PY) -m extras.plot --figures figures

# Tests run in parallel processes, one a core.
test: lint
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: .venv/dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

bench: .venv/ready
	$(PY) tests/bench.py $(ARGS)

# The tests have so many seconds, bench_gpu.py has 300. Tests run in ten processes, or in one a core where the
# cores are fewer: 31 s on an H200 with 16 cores, of 140 in one process.
GPU_TESTS ?= 160
PARALLEL := -n auto --maxprocesses 10
gpu-check: lint
	@command -v nvidia-smi >/dev/null || { echo "error: no NVIDIA GPU here (nvidia-smi is missing)"; exit 2; }
	@status=0; HANDMADE_GPU=1 timeout -s INT -k 10 $(GPU_TESTS) $(PY) -m pytest tests/test_cuda*.py $(PARALLEL) || status=$$?; \
	[ $$status -lt 124 ] || echo "error: the tests took more than $(GPU_TESTS) seconds and were stopped; the second time all kernels are compiled"; \
	$(PY) tests/bench_gpu.py --write $(ARGS) || status=1; exit $$status

clean:
	rm -rf .venv cache shards .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
