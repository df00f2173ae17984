# Every target works on a fresh machine: it makes .venv, installs the project there, and does its job.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONUNBUFFERED = 1

.PHONY: quickstart test test-all lint types wheel docs clean

quickstart: .venv/installed
	$(BIN)/design-train fit --config quickstart

test: .venv/installed
	$(BIN)/python -m pytest

test-all: test
	$(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	.ci/check_types

wheel: .venv/installed
	.ci/check_wheel

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,data,tracking,export,docs]"
	touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
