# Two commands do everything on a fresh machine: `make ladder` and `make test`. Each sets up what it needs.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup ladder test lint hooks format ui lock results clean

PYTHON ?= python3
# The machine's uv if it has one, else a pinned one inside the project.
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
BIN := .venv/bin
STAMP := .venv/.installed
export DAGSTER_DISABLE_TELEMETRY = 1

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.uv/bin/uv: requirements-uv.lock
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock
	@touch $@

ifeq ($(UV),.uv/bin/uv)
$(STAMP): .uv/bin/uv
endif
$(STAMP): requirements.lock pyproject.toml .python-version
	@test -x $(BIN)/python || $(UV) venv --quiet --python "$$(cat .python-version)" .venv
	$(UV) pip sync --quiet --compile-bytecode --require-hashes requirements.lock
	$(UV) pip install --quiet --no-deps --editable .
	@touch $@

setup: $(STAMP)  ## make the locked environment in .venv

ladder: $(STAMP)  ## materialise the whole graph of the smoke experiment
	$(BIN)/dagster asset materialize -m vpmoe_assets.definitions --select '*'

ui: $(STAMP)  ## open the Dagster UI on http://127.0.0.1:3000
	$(BIN)/dagster dev -w workspace.yaml -h 127.0.0.1 -p 3000

test: $(STAMP) lint  ## lint, then run every test this machine can run
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

lint: $(STAMP)  ## ruff, mypy, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

hooks: $(STAMP)  ## run `make lint` before every commit
	$(BIN)/pre-commit install

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: | $(STAMP)  ## compile requirements.lock from pyproject.toml
	$(UV) pip compile pyproject.toml --group dev --universal --python-version 3.12 \
	  --generate-hashes --no-emit-index-url --no-header --quiet --output-file requirements.lock

results: $(STAMP)  ## render benchmarks/RESULTS.md from benchmarks/results.jsonl
	$(BIN)/python -m benchmarks.render

clean:  ## remove the environment (artifacts stay)
	rm -rf .venv .uv
