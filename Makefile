# `make demo` is all a new user needs: it makes .venv once (a few minutes), then runs the demo.

VENV   := .venv
PYTHON := $(VENV)/bin/python
PIP    := $(PYTHON) -m pip --disable-pip-version-check install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo-stamp ## audit the shipped model and write runs/demo/report.html
	@$(VENV)/bin/holdfast demo

test: $(VENV)/.test-stamp ## run the tests
	$(PYTHON) -m pytest -q -n 2 --dist loadfile

check: $(VENV)/.test-stamp ## lint, formatting and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

bench: $(VENV)/.test-stamp ## run the benchmarks
	$(PYTHON) -m benchmarks

clean: ## remove .venv, caches and build outputs; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The first interpreter that really runs and is new enough: a name on PATH may be an empty shim.
# The pinned versions were tested with 3.11, so it comes first.
$(PYTHON):
	@for python in python3.11 python3.12 python3.13 python3 python; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$($$python --version)."; \
	    $$python -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); exit 1; \
	  fi; \
	done; \
	echo "holdfast needs Python 3.11 or newer; python3 here is: $$(python3 --version 2>&1)." >&2; \
	echo "Install one so that python3.11 (or a newer python3) is on PATH, then run make again." >&2; \
	exit 1

# The interpreter is order-only: it is a link whose date says nothing about what was installed.
$(VENV)/.demo-stamp: pyproject.toml constraints.txt | $(PYTHON)
	@echo "Installing holdfast and its pinned dependencies into $(VENV). A few minutes, once."
	@$(PIP) -e .
	@touch $@

$(VENV)/.test-stamp: $(VENV)/.demo-stamp
	@echo "Installing the test tools into $(VENV)."
	@$(PIP) -e '.[test]'
	@touch $@
