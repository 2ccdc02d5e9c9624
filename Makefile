# Two commands do everything on a fresh machine: `make ladder` and `make test`. Each sets up what it needs.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup ladder style test test-services lint hooks format ui fused ray lock results clean always

PYTHON ?= python3
# The machine's uv if it has one, else a pinned one inside the project.
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
BIN := .venv/bin
STAMP := .venv/.installed
export DAGSTER_DISABLE_TELEMETRY = 1

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 15

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
	$(BIN)/python -m compileall -q trainer vpmoe_assets
	@touch $@

# Dagster reads .env where a command is started, before any code of this project, and finds its instance by it. The
# path is absolute because PWD, which only shells keep, may name another directory. Other lines are left alone, and so
# is a DAGSTER_HOME without the note at its end.
NOTE := \# written by make
DAGSTER_HOME_LINE := DAGSTER_HOME='$(CURDIR)' $(NOTE)
.env: always
	@test -e $@ || echo DAGSTER_DISABLE_TELEMETRY=1 > $@
	@if grep -v -e '$(NOTE)$$' -e '$${PWD}' $@ | grep -q '^DAGSTER_HOME='; then :; \
	elif ! grep -qxF "$(DAGSTER_HOME_LINE)" $@; then \
	  { grep -v '^DAGSTER_HOME=' $@; echo "$(DAGSTER_HOME_LINE)"; } > $@.new; mv $@.new $@; fi

setup: $(STAMP) .env  ## make the locked environment in .venv, and .env for Dagster

ladder: $(STAMP) .env  ## materialise the whole graph of the smoke experiment
	$(BIN)/vpmoe make

ui: $(STAMP) .env  ## open the Dagster UI on http://127.0.0.1:3000, or what is free, with the pages; PORT=8080 chooses
	@port=$$($(BIN)/python -m vpmoe_assets.port '$(subst ','\'',$(PORT))') && \
	export VPMOE_BROWSE_PORT=$$($(BIN)/python -m vpmoe_assets.port pages) && \
	{ $(BIN)/vpmoe report-events --offer || true; } && { $(BIN)/vpmoe browse --beside & } && \
	exec $(BIN)/dagster dev -w workspace.yaml -h 127.0.0.1 -p "$$port"

# The type check is a minute of one core for which nothing waits; what else lint says, it says before the tests.
# Tests wait for processes, locks and pauses as long as they work: six workers keep two cores busy, three did not.
test: $(STAMP) .env  ## lint, then every test this machine can run; the type check beside them
	@said=$$(mktemp); trap 'rm -f "$$said"' EXIT; \
	$(BIN)/mypy > "$$said" 2>&1 & types=$$!; \
	$(MAKE) --no-print-directory style || { kill $$types; exit 1; }; \
	$(BIN)/python -m pytest -n 6 --dist loadscope --no-loadscope-reorder -m 'not services'; tests=$$?; \
	wait $$types || tests=1; cat "$$said"; exit $$tests

# Whoever carries the mark is one of them. Slurm's, which wait more than they work, come first, beside all others.
test-services: $(STAMP) .env  ## tests that need servers or minutes: Slurm, Ray, PostgreSQL, a shared store, faults
	@$(MAKE) --no-print-directory ray || printf '\n*** NOT INSTALLED: Ray.\n*** LEFT OUT: tests of shards and jobs on Ray.\n\n'
	$(BIN)/python -m tests.services.debian
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m services --durations=15 \
	  $$(grep -rlE 'mark\.services\b' tests --include='test_*.py' | sort -r)

lint: style  ## ruff, mypy, and who may import whom
	$(BIN)/mypy

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

hooks: $(STAMP)  ## run `make lint` before every commit
	$(BIN)/pre-commit install

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fused: $(STAMP)  ## add the kernels of training.backend = "fused" (Linux, x86-64, a Hopper GPU)
	$(UV) pip install --quiet --require-hashes -r requirements-fused.lock

ray: $(STAMP)  ## add Ray: engine = "ray", shards on many machines
	$(UV) pip install --quiet --require-hashes -r requirements-ray.lock

lock: | $(STAMP)  ## compile requirements.lock, and those of the extras fused and ray, from pyproject.toml
	$(UV) pip compile pyproject.toml --extra attest --extra postgres --group dev --universal --python-version 3.12 \
	  --generate-hashes --no-emit-index-url --no-header --quiet --output-file requirements.lock
	$(UV) pip compile pyproject.toml --extra fused --python-version 3.12 --prerelease if-necessary-or-explicit \
	  --python-platform x86_64-manylinux_2_28 --constraint requirements.lock \
	  --generate-hashes --no-emit-index-url --no-header --quiet --output-file requirements-fused.lock
	$(UV) pip compile pyproject.toml --extra ray --universal --python-version 3.12 --constraint requirements.lock \
	  --generate-hashes --no-emit-index-url --no-header --quiet --output-file requirements-ray.lock

results: $(STAMP)  ## render benchmarks/RESULTS.md from benchmarks/results.jsonl
	$(BIN)/python -m benchmarks.render

clean:  ## remove the environment (artifacts stay)
	rm -rf .venv .uv
