# Every target sets up what it needs; the second call is quick. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv is fast but does not look where pip is told to look for wheels; tell it too.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
EXTRA_USE :=
EXTRA_DEV := [dev]
install = $(BIN)/python -m uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet uv || true; \
	if $(BIN)/python -m uv --version >/dev/null 2>&1; \
	then $(BIN)/python -m uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".$(1)"; \
	else $(BIN)/python -m pip install --quiet -c constraints.txt -e ".$(1)"; fi

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
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/use.stamp: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(call install,$(EXTRA_USE))
	@touch $@

$(VENV)/dev.stamp: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) with what development needs (a few minutes the first time)"
	@$(call install,$(EXTRA_DEV))
	@touch $@ $(VENV)/use.stamp
