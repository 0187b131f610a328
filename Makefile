# Every target makes .venv on its first use, with the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench bench-compare static tune plots help

help:
	@echo "make demo    fine-tune a small Llama with S2FT and show what it saves, beside the other methods"
	@echo "make test    all tests"
	@echo "make check   linter, formatter and type checker"
	@echo "make bench   every op, and training steps of every method, into bench/results/<device>/"
	@echo "make bench-compare   a few steps again: is anything slower or larger than in the results?"
	@echo "make static  what the kernels compile to on GPUs that are not here, into bench/results/static/"
	@echo "make tune    launch parameters of the kernels, measured on the GPU here"
	@echo "make plots   every figure and the tables of the README, from the committed results"

demo: $(VENV)/.installed
	$(BIN)/python -m bench.demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m pytest bench/kernels/bench_ops.py --results bench/results --again --budget-s 60
	$(BIN)/python -m bench.laboratory --again --budget-s 850

bench-compare: $(VENV)/.installed
	$(BIN)/python -m bench.compare

static: $(VENV)/.installed
	$(BIN)/python -m bench.kernels.compile

tune: $(VENV)/.installed
	$(BIN)/python -m bench.kernels.tune

plots: $(VENV)/.installed
	$(BIN)/python -m plots --readme README.md

# torch first, alone and pinned: a range would let what depends on it choose another build. Where
# venv cannot bring pip (Debian without python3-venv), the pip of $(PYTHON) installs it. galore-torch
# last and alone: it asks for bitsandbytes, large and compiled, for an optimizer that is not measured.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install -q -c constraints.txt torch triton
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps galore-torch
	touch $@
