# Two commands: `make train` and `make test`. Each sets up all that it needs and may be run again at any time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CUDA_VENV := .venv-cuda
CUDA_READY := $(CUDA_VENV)/.ready
ARGS ?=

.PHONY: help setup train test test-long faults fuzz-files bench null-gpu compile-ahead mutants lint format golden pins clean

help:
	@echo "make train   install into $(VENV) and train R-MAE on the embedded sample set (ARGS='--steps 50' adds flags)"
	@echo "make test    install into $(VENV) and run all tests (ARGS='-k rmae' selects, ARGS='-n 0 -s' shows what they print)"
	@echo "make test-long  the tests that take minutes each: teachers on four ranks, more kills, more launches"
	@echo "make faults  kills, signals, damaged files and numbers put into real runs, one table (hours; ARGS='signals --tries 16')"
	@echo "make fuzz-files  2,000 broken images of 21 kinds through both decoders (ARGS='--seed 1 --count 9000')"
	@echo "make bench   everything that is measured on a GPU, in ten minutes (ARGS='--quick' in 5, ARGS='--rehearse' on a CPU)"
	@echo "make null-gpu  the host side of GPU runs on a CUDA device that runs nothing (ARGS='--record' pins its counts anew)"
	@echo "make compile-ahead  compile every kernel in every configuration for sm_80, 90, 100, without a GPU, and check its machine code (minutes)"
	@echo "make mutants plant every listed fault: each must turn a test red (an hour; ARGS='ema losses' takes these groups)"
	@echo "make lint    ruff, import contracts, mypy, codespell"
	@echo "make format  ruff format and the fixes it knows"
	@echo "make golden  record the golden losses anew, after a change that is meant to change results"
	@echo "make pins    write constraints.txt from what is installed"
	@echo "make clean   remove $(VENV), $(CUDA_VENV) and caches"

setup: $(READY)

# The stamp is written last, so an interrupted installation is taken up again. A $(VENV) without a working
# interpreter (moved, or left half made) is made anew.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"fastmim wants Python 3.11 to 3.13, got {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[engine,dev]'
	@touch $@

# $(READY) outlives a deleted interpreter: look before every use
.PHONY: alive
alive:
	@$(BIN)/python -c 'import torch, fastmim' >/dev/null 2>&1 || rm -f $(READY)
	@$(MAKE) --no-print-directory setup

train: alive
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed fastmim/train.py --method rmae $(ARGS)

test: alive
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: alive
	$(BIN)/python -m pytest -n 0 -m long $(ARGS)

faults: alive
	$(BIN)/python -m tests.faults $(ARGS)

fuzz-files: alive
	$(BIN)/python -m tests.data.fuzz_files $(ARGS)

bench: alive
	$(BIN)/python benchmarks/gpu_round.py $(ARGS)

# Apart from $(VENV): a CUDA build of torch is 5 GB, and its tests need no GPU. Where it cannot be had they are skipped.
$(CUDA_READY): tests/null_gpu/requirements.txt
	@$(CUDA_VENV)/bin/python -m pip --version >/dev/null 2>&1 || { rm -rf $(CUDA_VENV)/* && $(PYTHON) -m venv $(CUDA_VENV); }
	$(CUDA_VENV)/bin/python -m pip install -q -r $<
	@touch $@

null-gpu:
	@$(MAKE) --no-print-directory $(CUDA_READY) || \
	  { echo "null-gpu skipped: $(CUDA_VENV) has no CUDA build of torch, and it could not be installed (see above)"; exit 0; }; \
	  FASTMIM_NULL_GPU=1 PYTHONPATH=kernels $(CUDA_VENV)/bin/python -m pytest tests/null_gpu $(ARGS)

compile-ahead: alive
	FASTMIM_COMPILE_ALL=1 $(BIN)/python -m pytest tests/ops/test_compile_ahead.py tests/ops/test_machine_code.py

mutants: alive
	$(BIN)/python tests/mutants/run.py $(ARGS)

lint: alive
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	@if [ -x $(BIN)/codespell ]; then $(BIN)/codespell; else echo "codespell is not installed: pip install '.[lint]'"; fi

format: alive
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: alive
	@for method in $$($(BIN)/python -c 'from fastmim.methods import METHODS; print(*METHODS)'); do \
	  $(BIN)/python tests/losses/golden.py $$method --write; done

pins: alive
	@{ head -1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -vi '^fastmim\|^-e' | sed 's/+.*//'; } > constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) $(CUDA_VENV) build/null_gpu .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
