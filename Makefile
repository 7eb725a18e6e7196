# Every target sets up what it needs; the second call is quick. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DECLARED := setup.cfg pyproject.toml constraints.txt
# Without bytecode every command would compile torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

# uv takes seconds where pip takes minutes; it is told where pip has been told to look for wheels.
define install
	@echo "installing into $(VENV), a few minutes the first time"
	@$(BIN)/python -m uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null || true
	@if $(BIN)/python -m uv --version >/dev/null 2>&1; then \
		wheels="$${PIP_FIND_LINKS:-$$($(BIN)/python -m pip config get global.find-links 2>/dev/null)}"; \
		for folder in $$wheels; do set -- "$$@" --find-links "$$folder"; done; \
		$(BIN)/python -m uv pip install --quiet --python $(BIN)/python "$$@" -c constraints.txt -e "$(1)"; \
	else \
		$(BIN)/python -m pip install --quiet -c constraints.txt -e "$(1)"; \
	fi
endef

.PHONY: help demo test check bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

demo: $(VENV)/use.stamp ## install, then a report, an answer, a box and masks from one scan, in out/
	$(BIN)/m3d demo --out out --force

test: $(VENV)/dev.stamp ## install for development, then run the tests
	$(BIN)/python -m pytest

check: $(VENV)/dev.stamp ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/dev.stamp ## measure speed and accuracy into benchmarks/results/
	@set -e; for script in $(sort $(wildcard benchmarks/*.py)); do echo "$$script"; $(BIN)/python $$script; done

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " \
		+ sys.version.split()[0] + "; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/use.stamp: $(DECLARED) | $(BIN)/python
	$(call install,.)
	@touch $@

$(VENV)/dev.stamp: $(DECLARED) | $(BIN)/python
	$(call install,.[dev])
	@touch $@ $(VENV)/use.stamp
