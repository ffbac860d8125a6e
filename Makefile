# `make demo` and `make test` set up everything they need in .venv, on any machine with Python 3.11+.
#
#   make demo PORT=9000                       another port
#   make demo PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'
#                                             torch's small CPU build instead of its CUDA build

PYTHON   ?= python3
PORT     ?= 8000
HOST     ?= 127.0.0.1
PIP_ARGS ?=
VENV     := .venv
BIN      := $(VENV)/bin
PIP      := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)

DEMO       := checkpoints/demo
CHECKPOINT := checkpoints/demo-w8a16
ENGINE     := checkpoints/demo-engine

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-full check clean

help:
	@echo 'make demo       convert, build and serve the demo model on port $(PORT)'
	@echo 'make test       what CI runs: formatting, lint, types, imports, tests (no GPU, no network)'
	@echo 'make test-full  all of that and the long tests'
	@echo 'make clean      remove .venv and what the demo made'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'llmserve needs Python 3.11 or later; name one with make PYTHON=python3.11' >&2; exit 1; }
	@echo '== creating $(VENV)'
	@$(PYTHON) -m venv $(VENV)

# A stamp for each set of extras, so that the demo does not install what only the tests need.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo '== installing llmserve into $(VENV) (the first time takes some minutes)'
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo '== installing what the tests need'
	@$(PIP) --editable '.[test,lint]'
	@touch $@

install: $(VENV)/.installed

$(CHECKPOINT)/config.json: $(VENV)/.installed $(wildcard $(DEMO)/*.safetensors $(DEMO)/*.json)
	@echo '== llmserve convert $(DEMO) $(CHECKPOINT) --quant w8a16'
	@rm -rf $(CHECKPOINT)
	@$(BIN)/llmserve convert $(DEMO) $(CHECKPOINT) --quant w8a16

$(ENGINE)/config.json: $(CHECKPOINT)/config.json
	@echo '== llmserve build $(CHECKPOINT) $(ENGINE)'
	@rm -rf $(ENGINE)
	@$(BIN)/llmserve build $(CHECKPOINT) $(ENGINE)

demo: $(ENGINE)/config.json
	@echo '== llmserve serve $(ENGINE) --host $(HOST) --port $(PORT)'
	@exec $(BIN)/llmserve serve $(ENGINE) --served-model-name demo --host $(HOST) --port $(PORT)

test: $(VENV)/.installed-test
	@scripts/check

test-full: $(VENV)/.installed-test
	@scripts/check --full

check: test

clean:
	rm -rf $(VENV) $(CHECKPOINT) $(ENGINE)
