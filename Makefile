# `make demo` runs the main job on a fresh machine; `make test` proves the package. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-sandbox-long test-clients lint setup setup-sandbox wheel clean help

help:
	@echo "make demo       set up, then let the shipped model work on real files in a sandbox"
	@echo "make test       set up, then lint, types and tests (under 10 minutes on two cores)"
	@echo "make test-slow  the longer suites"
	@echo "make test-sandbox-long  1,000 kills, 10,000 containers, thousands at once; writes bench/results/sandbox_*.json (an hour)"
	@echo "make test-clients  real agents against the server (installs them with npm and pip); writes bench/results/clients"
	@echo "make setup-sandbox  what sandboxes need from apt (crun); without it their tests are skipped"
	@echo "make wheel      build dist/*.whl with the model inside"

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml scripts/setup
	@PYTHON="$(PYTHON)" scripts/setup $(VENV)

setup-sandbox:
	@scripts/setup-sandbox

demo: setup
	@$(BIN)/nautile demo

lint: setup
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2 -m "not slow" --durations=15 --ignore=tests/gpu
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 -m "not slow" --durations=3 tests/gpu
	@echo "All passed. Next: make demo, or .venv/bin/nautile --help"

test-slow: setup
	$(BIN)/python bench/suite.py --out bench/results/suite_one_answer.json -- -n 0 tests/engine/test_one_answer.py
	$(BIN)/pytest -m slow --durations=15

test-sandbox-long: setup
	$(BIN)/pytest -n 0 -m slow tests/sandbox
	$(BIN)/python bench/sandbox/chaos.py kills --kills 1000 --out bench/results/sandbox_chaos.json
	$(BIN)/python bench/sandbox/chaos.py cycles --cycles 10000 --out bench/results/sandbox_cycles.json
	$(BIN)/python bench/sandbox/fleet.py density --count 3000 --out bench/results/sandbox_fleet_density.json
	$(BIN)/python bench/sandbox/fleet.py calls --out bench/results/sandbox_fleet_calls.json
	$(BIN)/python bench/sandbox/bias.py --out bench/results/sandbox_bias.json

test-clients: setup
	$(BIN)/pytest -n 0 tests/clients/check_clients.py

wheel: setup
	$(BIN)/python -m pip wheel --no-deps -w dist .

clean:
	rm -rf $(VENV) dist build
