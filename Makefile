PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help venv test slow demo clean

help:
	@echo "make venv   create .venv and install the package with its development tools"
	@echo "make test   ruff, pyright and the quick tests"
	@echo "make slow   the tests that take minutes"
	@echo "make demo   train a small MAG model on Python's own source files, about three minutes"
	@echo "make clean  remove .venv and every cache"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("titans-miras needs Python 3.10 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# One thread in each of the two test processes: more would only compete for the same cores.
test slow: export OMP_NUM_THREADS := 1
test: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n 2

slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m slow

demo: $(STAMP)
	$(BIN)/python scripts/demo.py

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
