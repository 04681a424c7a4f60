# The two commands: `make demo` and `make test`. Both set up .venv first; nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= smollm2-135m

.PHONY: demo serve test test-fast check setup clean

demo: setup
	$(BIN)/python scripts/demo.py

serve: setup
	$(BIN)/shoal serve $(MODEL)

test: setup
	bash scripts/check.sh all

test-fast: setup
	bash scripts/check.sh fast

check: setup
	bash scripts/check.sh static

setup: $(VENV)/.ready

# torch first and alone: its pin chooses the build, and everything else then finds it installed.
$(VENV)/.ready: pyproject.toml constraints.txt $(shell find csrc -type f)
	$(PYTHON) -c 'import sys; sys.exit("Shoal needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -m pip install --quiet ./csrc || echo 'The native kernels were not built (is there a C++ compiler?): Shoal runs without them, slower.'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
