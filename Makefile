PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test figures bench base lint
demo: $(VENV)/ready  ## personalise the embedded base for a bundled subject
	$(RUN) -m dreambooth_lib demo

test: $(VENV)/ready  ## the whole test suite
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest

figures: $(VENV)/ready  ## every bundled subject, with and without the prior
	$(RUN) -m dreambooth_lib figures

bench: $(VENV)/ready  ## a step beside the U-Net alone, an evaluation's pace: outputs/bench.json
	$(RUN) -m tools.bench

base: $(VENV)/ready  ## make data/toybox anew (hours)
	$(RUN) -m tools.toybox build

$(VENV)/ready: requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch -c constraints.txt
	$(RUN) -m pip install --quiet -e ".[test]" -c constraints.txt
	touch $@
