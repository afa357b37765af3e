# Two commands on a fresh machine: `make demo` shows the main job, `make test` passes the tests.
# Both make the environment first where it is not there yet.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow lint clean

demo: $(VENV)/installed
	@echo "== demo: the breast cancer table that scikit-learn ships, from CSV to report"
	@rm -rf demo && mkdir demo
	@$(BIN)/python examples/breast_cancer.py demo/breast_cancer.csv
	$(BIN)/goodfit fit demo/breast_cancer.csv --target diagnosis --out demo/run
	$(BIN)/goodfit predict demo/run demo/breast_cancer.csv -o demo/predictions.csv
	@echo "== open demo/run/report.html in a browser"

test: $(VENV)/tested
	@echo "== tests"
	$(BIN)/python -m pytest

slow: $(VENV)/tested
	@echo "== tests of ten seconds and more"
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/tested
	@echo "== ruff and mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "== making the environment in $(VENV) and installing goodfit (about two minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(f"goodfit needs Python 3.11 or newer, got {sys.version.split()[0]}; say make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/tested: $(VENV)/installed
	@echo "== installing what the tests need (Lightning and Transformers among it)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,lint]"
	@touch $@

clean:
	rm -rf $(VENV) demo
