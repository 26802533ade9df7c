# Two commands: `make demo` trains the demo preset, `make test` runs every check. Both install what they need
# into VENV first, at the versions of constraints.txt, and install again only after pyproject.toml or constraints.txt
# has changed. VENV must not contain spaces.
PYTHON ?= python3
VENV ?= .venv
bin := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: help demo test lint docs floor newest gpu clean

help:
	@echo "make demo    train the demo preset on the built-in corpus; the report is in runs/demo-DATE-TIME/"
	@echo "make test    ruff, mypy and pytest"
	@echo "make lint    ruff and mypy alone"
	@echo "make docs    build the documentation into site/; warnings are errors"
	@echo "make floor   the core tests with the oldest NumPy that is allowed (torch is at its oldest already)"
	@echo "make newest  install the wheel with base dependencies alone, the newest torch; compile every kernel with it"
	@echo "make gpu     on a machine with a GPU: doctor, tests/gpu and every benchmark, under nine minutes; OUT=DIR for the results"
	@echo "make clean   remove caches and build leftovers; keeps $(VENV)/ and runs/"
	@echo "PYTHON=python3.12 chooses the interpreter of a new environment, VENV=DIR its folder."

# A dated name: a second demo neither stops at the first one's folder nor overwrites it.
demo: $(VENV)/.installed-demo
	$(bin)/agrepa train demo train.name=demo-$$(date +%Y%m%d-%H%M%S)

lint: $(VENV)/.installed-dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --strict --quiet

# pytest comes last, so that its closing line ends the output. One process a core, one thread each; a file stays in one
# process, since its fixtures may take minutes.
test: lint docs
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -n auto --dist loadfile

# torch 2.11.0, of constraints.txt, is the oldest allowed; NumPy's oldest goes in front of the environment's own.
floor: $(VENV)/.installed-dev
	$(bin)/python -m pip install --quiet --upgrade --target $(VENV)/floor 'numpy==1.26.*'
	PYTHONPATH=$(VENV)/floor $(bin)/python -c 'import numpy; assert numpy.__version__.startswith("1.26.")'
	PYTHONPATH=$(VENV)/floor $(bin)/python -m pytest -q --durations=0 --durations-min=99 tests/ops tests/models tests/attribution/test_runner.py tests/alignment/test_loss.py

newest:
	rm -rf build $(VENV)/newest
	$(PYTHON) -m venv $(VENV)/newest
	$(VENV)/newest/bin/python -m pip install --quiet .
	$(VENV)/newest/bin/python tests/packaging/clean_install.py

# Installs nothing: it measures whatever torch and Triton PYTHON has. OUT is the folder of the results.
OUT ?= bench/results
gpu:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m agrepa_fast.bench.gpu "$(OUT)"

clean:
	rm -rf build dist site $(VENV)/newest $(VENV)/floor *.egg-info .coverage .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -path './$(VENV)' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(bin)/python
	$(bin)/python -m pip install -c constraints.txt -e '.[audio,train]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(bin)/python
	$(bin)/python -m pip install -c constraints.txt -e '.[dev]'
	$(bin)/python -m pip install -c constraints.txt --no-deps f5-tts voicebox-pytorch
	@touch $@

# Checked first: an environment made with an old interpreter would be found, and used, by the next call.
$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python %d.%d; 3.11 or newer is needed: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
