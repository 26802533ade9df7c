# Two commands: `make demo` trains the demo preset, `make test` runs every check. Both install what they need
# into VENV first, and install again only after pyproject.toml has changed. VENV must not contain spaces.
PYTHON ?= python3
VENV ?= .venv
bin := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: help demo test lint docs gpu clean

help:
	@echo "make demo    train the demo preset on the built-in corpus; the report is in runs/demo-DATE-TIME/"
	@echo "make test    ruff, mypy and pytest"
	@echo "make lint    ruff and mypy alone"
	@echo "make docs    build the documentation into site/; warnings are errors"
	@echo "make gpu     on a machine with a GPU: doctor, tests/gpu and every benchmark, under nine minutes"
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

# pytest comes last, so that its closing line ends the output.
test: lint docs
	$(bin)/python -m pytest

# Installs nothing: it measures whatever torch and Triton PYTHON has.
gpu:
	PYTHONPATH=$(CURDIR) $(PYTHON) -m agrepa_fast.bench.gpu

clean:
	rm -rf build dist site *.egg-info .coverage .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -path './$(VENV)' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed-demo: pyproject.toml | $(bin)/python
	$(bin)/python -m pip install -e '.[audio,train]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(bin)/python
	$(bin)/python -m pip install -e '.[dev]'
	@touch $@

# Checked first: an environment made with an old interpreter would be found, and used, by the next call.
$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python %d.%d; 3.11 or newer is needed: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
