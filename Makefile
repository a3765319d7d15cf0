# make demo   installs into .venv on the first run, then paints, heals and measures (minutes)
# make test   the default test suite, as CI runs it
# make docs   builds the site into site/

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all docs lint clean

demo: .venv/installed
	$(BIN)/pared demo -o .demo

test: .venv/installed-test
	$(BIN)/python -m pytest -n auto

test-all: .venv/installed-test
	$(BIN)/python -m pytest -n auto -m "not gpu"

lint: .venv/installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: .venv/installed-docs
	$(BIN)/python docs/build.py

.venv/installed: pyproject.toml scripts/install.sh
	PYTHON=$(PYTHON) sh scripts/install.sh
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --group test
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

clean:
	rm -rf .venv .demo site
