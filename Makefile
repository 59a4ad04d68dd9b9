# Two commands matter: `make demo` and `make test`. Both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2

.PHONY: setup demo test test-slow lint types accept bench docs clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("leanplan needs Python 3.11 or newer, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --config-settings editable_mode=compat --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/leanplan plan examples/tiny-lm.yaml

test: setup
	$(PYTEST)

test-slow: setup
	$(PYTEST) -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

accept: setup
	LEANPLAN_ACCEPT=1 $(BIN)/python -m pytest tests/golden

bench: setup
	for f in benchmarks/*.py; do $(BIN)/python $$f; done

docs: setup
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build *.egg-info
