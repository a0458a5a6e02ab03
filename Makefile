# `make demo` and `make test` need Python 3.10 or newer (PYTHON=... picks one) and, the first time,
# the network that pip uses. Each keeps an environment of its own; nothing is installed elsewhere.

PYTHON ?= python3
# Installed before the rest and exactly so: with no torch there, pip takes the newest build, with
# gigabytes of CUDA libraries. Where PyTorch's index of CPU builds can be reached, it is smaller still:
# make test TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
# More arguments for pytest: make test PYTEST="-k cache -x"
PYTEST ?=

DEMO := .venv-demo
TEST := .venv-test
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
PACKAGE := pyproject.toml $(shell find relaxlm -type f -not -path '*/__pycache__/*')

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs families clean

help:
	@echo "make demo     install relaxlm into $(DEMO), then convert, compile and talk to a small model"
	@echo "make test     lint, type check and test, in $(TEST)"
	@echo "make lint     only formatting, lint and type check"
	@echo "make format   format the code and mend what ruff can mend"
	@echo "make docs     write docs/commands.md anew"
	@echo "make families measure every model family and write the table of docs/models.md"
	@echo "make clean    remove both environments and all caches"

demo: $(DEMO)/ready
	@$(DEMO)/bin/relaxlm demo

test: lint
	@echo "== pytest"
	@PYTHONDONTWRITEBYTECODE= $(TEST)/bin/python -m pytest -n auto $(PYTEST)

lint: $(TEST)/ready
	@echo "== ruff, mypy"
	@$(TEST)/bin/ruff format --check .
	@$(TEST)/bin/ruff check .
	@$(TEST)/bin/mypy

format: $(TEST)/ready
	@$(TEST)/bin/ruff format .
	@$(TEST)/bin/ruff check --fix .

docs: $(TEST)/ready
	@$(TEST)/bin/python tools/command_reference.py

families: $(TEST)/ready
	@$(TEST)/bin/python -m tests.models.families

clean:
	rm -rf $(DEMO) $(TEST) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A folder with an environment is ready when the file `ready` in it is newer than what it was made of.
define new_environment
@command -v $(PYTHON) >/dev/null || \
    { echo "error: there is no program $(PYTHON); name a Python: make PYTHON=python3.12 ..."; exit 1; } >&2
@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.version_info >= (3, 10) or sys.exit( \
    "error: $(PYTHON) is Python " + v + ", relaxlm needs 3.10 or newer: make PYTHON=python3.12 ...")'
@echo "== environment $(@D) ($$($(PYTHON) -V))"
@$(PYTHON) -m venv $(@D)
endef

$(DEMO)/ready: $(PACKAGE)
	$(new_environment)
	@echo "== installing relaxlm and TVM (about 135 MB the first time)"
	@rm -rf build  # setuptools would install files that are no longer in relaxlm/
	@$(DEMO)/bin/python $(PIP_INSTALL) .
	@touch $@

$(TEST)/ready: pyproject.toml
	$(new_environment)
	@echo "== installing $(TORCH), the reference in tests"
	@$(TEST)/bin/python $(PIP_INSTALL) $(TORCH)
	@echo "== installing relaxlm[test] and TVM"
	@$(TEST)/bin/python $(PIP_INSTALL) --editable '.[test]'
	@touch $@
