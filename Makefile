# Every target makes .venv on its first use, with the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEVICE ?= cpu

.PHONY: demo test check bench plots help

help:
	@echo "make demo    fine-tune a small Llama with S2FT and show what it saves, beside the other methods"
	@echo "make test    all tests"
	@echo "make check   linter, formatter and type checker"
	@echo "make bench   benchmarks of the ops, into bench/results/$(DEVICE)/ (DEVICE=name to change)"
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
	mkdir -p bench/results/$(DEVICE)
	$(BIN)/python -m pytest bench --benchmark-json=bench/results/$(DEVICE)/ops.json

plots: $(VENV)/.installed
	$(BIN)/python -m plots --readme README.md

# torch first, alone and pinned: a range would let what depends on it choose another build. Where
# venv cannot bring pip (Debian without python3-venv), the pip of $(PYTHON) installs it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install -q -c constraints.txt torch triton
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
