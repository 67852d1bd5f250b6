# The project's commands; `make` alone lists them. Needs make 3.81 and Python 3.11, or newer ones.
# Whatever runs first installs what it needs into .venv, once, and again when the lock file changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore $(BIN)/python -m pip --quiet
UV := uv==0.13.9
SBOM := dist/holdfast.cdx.json
# The pure core: its own unit tests alone must reach every branch of these.
CORE := client/holdfast_client/messages.py,ledger/periods.py,ledger/rules/*.py

# An upgrade of Python leaves an environment that cannot run, or that no longer finds its packages.
FITS := import os, sys; sys.exit(not os.path.isdir("$(VENV)/lib/python%d.%d/site-packages" % sys.version_info[:2]))
ifneq ($(wildcard $(VENV)/created.stamp),)
ifneq ($(shell $(BIN)/python -c '$(FITS)' 2>/dev/null && echo yes),yes)
$(info The Python of $(VENV) was upgraded or removed: $(VENV) is made anew as soon as it is needed.)
$(shell rm -f $(VENV)/*.stamp)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help demo up test unit soak bench lint format docs lock sbom clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/runtime.stamp ## a tour: start everything, run sample workflows, show the history
	@$(BIN)/holdfast demo

up: $(VENV)/runtime.stamp ## start everything in one data folder, until Ctrl-C
	@$(BIN)/holdfast up

# Hundreds of processes import the same modules: they are compiled once, also where the environment forbids that.
test: export PYTHONDONTWRITEBYTECODE =
test: $(VENV)/dev.stamp ## every check: lint, types, all tests, every branch of the core
	@$(MAKE) --no-print-directory --jobs=2 lint unit
	$(BIN)/pytest --ignore=tests/unit --numprocesses=4 --dist=loadfile --no-loadscope-reorder

unit: $(VENV)/dev.stamp ## the tests without servers, and every branch of the core
	$(BIN)/pytest tests/unit --cov --cov-report=
	$(BIN)/coverage report --include='$(CORE)' --fail-under=100

soak: $(VENV)/dev.stamp ## half an hour of faults: nothing lost, nothing applied twice
	$(BIN)/pytest -m soak
	HYPOTHESIS_PROFILE=soak $(BIN)/pytest tests/property
	$(BIN)/python -m tests.nemesis --minutes 30

bench: $(VENV)/runtime.stamp ## measure it, against the naive way: the table of docs/performance.md
	@$(BIN)/python -m bench

lint: $(VENV)/dev.stamp ## lint, format check, types, dead code
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/vulture

format: $(VENV)/dev.stamp ## format the code, repair what lint can repair
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/runtime.stamp ## write docs/messages.md and asyncapi.json again, after a change of the messages
	$(BIN)/python docs/generate_messages.py
	$(BIN)/python docs/generate_asyncapi.py

# One resolution for every supported Python and system. The tool has an environment of its own, so that a
# broken lock file cannot keep it from running.
COMPILE = UV_CUSTOM_COMPILE_COMMAND='make lock' .venv-lock/bin/uv pip compile --quiet --universal --upgrade \
	--generate-hashes --no-emit-index-url --no-strip-extras --no-annotate \
	--no-emit-package holdfast-client \
	pyproject.toml --extra server --extra embedded --extra otel --extra archive --group build
lock: ## rewrite both lock files: the newest versions that pyproject.toml allows
	@$(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python -m pip --quiet --disable-pip-version-check install '$(UV)'
	@$(COMPILE) --output-file requirements.txt
	@$(COMPILE) --constraints requirements.txt --extra dev --output-file requirements-dev.txt

# The warning that it leaves out: a lock file does not tell who requires whom.
sbom: $(VENV)/dev.stamp ## write down what requirements.txt locks, in CycloneDX: dist/holdfast.cdx.json
	@mkdir -p '$(dir $(SBOM))'
	@$(BIN)/python -W ignore::UserWarning:cyclonedx.model.bom -m cyclonedx_py requirements requirements.txt \
	  --pyproject pyproject.toml --output-reproducible --output-file '$(SBOM)'

clean: ## remove what these commands made, except the data folder .holdfast
	rm -rf $(VENV) .venv-lock dist htmlcov .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is touched last, so that an interrupted step is done again.
$(VENV)/created.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo 'Holdfast needs Python 3.11 or newer: name one, as in `make PYTHON=python3.12 …`.' >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/runtime.stamp: requirements.txt pyproject.toml client/pyproject.toml $(VENV)/created.stamp
	@echo 'Installing Holdfast into $(VENV) …'
	@$(PIP) install --require-hashes --requirement requirements.txt
	@$(PIP) install --no-deps --no-build-isolation --editable client --editable .
	@touch $@

$(VENV)/dev.stamp: requirements-dev.txt $(VENV)/runtime.stamp
	@echo 'Installing the development tools into $(VENV) …'
	@$(PIP) install --require-hashes --requirement requirements-dev.txt
	@touch $@
