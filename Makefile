PYTHON ?= python3
VENV := .venv
COLAB := .venv-colab
RUN := $(VENV)/bin/python

.PHONY: demo test figures bench base lint
demo: $(VENV)/ready  ## personalise the embedded base for a bundled subject
	$(RUN) -m dreambooth_lib demo

test: $(VENV)/ready $(COLAB)/ready  ## the whole test suite
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	OMP_NUM_THREADS=1 DREAMBOOTH_TEST_COLAB_PYTHON=$(abspath $(COLAB))/bin/python \
	    $(RUN) -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal

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

# Colab's versions of what a notebook runs on; the library is read from here.
$(COLAB)/ready: requirements.txt constraints-colab.txt
	$(PYTHON) -m venv $(COLAB)
	$(COLAB)/bin/python -m pip install --quiet torch -c constraints-colab.txt
	$(COLAB)/bin/python -m pip install --quiet -r requirements.txt -c constraints-colab.txt \
	    ipykernel ipython notebook nbmake pytest pytest-timeout
	touch $@
