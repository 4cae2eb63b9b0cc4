# The one door: every target makes what it needs, from Python 3.11 and nothing else.
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
# uv where present and recent enough to install a dependency group; pip otherwise.
UV := $(shell uv pip install --help 2>/dev/null | grep -q -e '--group' && command -v uv)
# A page may link to another site, but may not load a script, a style, a picture or a font from one.
LOADS_FROM_OUTSIDE := 'src="?(https?:)?//|<link[^>]*href="?(https?:)?//|(url\(|@import )["]?(https?:)?//'
BENCHES := $(sort $(wildcard benchmarks/bench_*.py))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test check fix bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make or refresh .venv (every other target does it by itself)

# Made afresh whenever pyproject.toml changes, so that a dropped dependency is really gone.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Walras needs Python 3.11 or later, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)"; \
	  echo "Name another one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
ifneq ($(UV),)
	@echo "Making .venv (uv) ..."
	@rm -rf .venv
	@uv venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv
	@uv pip install --quiet --python $(BIN)/python --editable . --group dev
else
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' lacks the venv module. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Making .venv (pip; a minute or two the first time) ..."
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
endif
	@touch $@

demo: $(STAMP) ## audit a sample log, learn a router and a menu from it, serve simulated models; leaves demo/
	@mkdir -p demo
	@$(BIN)/walras sample -o demo/sample.parquet
	@$(BIN)/walras audit demo/sample.parquet --budget-usd 0.012 --sla-s 30 --html demo/report.html
	@$(BIN)/walras fit demo/sample.parquet -o demo/router
	@$(BIN)/walras route --router demo/router --class code-edit --value 2 --lambda0 0.001 --prompt "Fix the failing test."
	@$(BIN)/walras menu --types lognormal:0.1:1.5 --quality-cost demo/sample.parquet --objective revenue
	@$(BIN)/python examples/service.py demo/service
	@echo "The report: $(CURDIR)/demo/report.html"

test: $(STAMP) ## run the tests (make test ARGS="-k regret"; ARGS="-m big": the long ones)
	@$(BIN)/pytest -n auto --dist loadfile $(ARGS)

check: $(STAMP) ## format, lint, types, import order; changes nothing
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

fix: $(STAMP) ## format, and mend what the linter can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP) ## run every benchmarks/bench_*.py in turn
	@set -e; for bench in $(BENCHES); do echo "== $$bench"; $(BIN)/python $$bench; done

docs: $(STAMP) ## build the documentation into site/
	@$(BIN)/mkdocs build --strict # no --quiet: it hides the warnings from --strict too
	@if grep -rnE $(LOADS_FROM_OUTSIDE) --include='*.html' --include='*.css' site; then \
	  echo "The site must read well without a network; the lines above load from outside."; exit 1; fi
	@echo "The documentation: $(CURDIR)/site/index.html"

clean: ## remove everything the targets made
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis demo site dist
	@find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
