# Each target makes its own virtual environment: it works as the first command of a fresh clone.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
DEMO ?= runs/demo
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test clean

help: ## what can be made
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.run ## a real model answers real questions: which of its layers to train first?
	$(BIN)/entropylens analyze --max-new-tokens 32 -o $(DEMO)

test: $(VENV)/.dev ## all checks: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

clean: ## remove the virtual environment and the demo's run
	rm -rf $(VENV) $(DEMO)

$(VENV)/.python:
	@sh constraints/needs.sh "$(PYTHON)"
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.python pyproject.toml constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run pyproject.toml constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt --editable '.[dev]'
	@touch $@
