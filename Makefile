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

# What a notebook on Colab finds, at Colab's versions; the library is read from here.
$(COLAB)/ready: requirements.txt requirements-colab.txt constraints-colab.txt tools/stand_ins.py
	$(PYTHON) -m venv --clear $(COLAB)
	$(COLAB)/bin/python -m tools.stand_ins
	$(COLAB)/bin/python -m pip install --quiet torch -c constraints-colab.txt
	$(COLAB)/bin/python -m pip install --quiet -r requirements.txt -r requirements-colab.txt \
	    -c constraints-colab.txt
	$(COLAB)/bin/python -m pip install --quiet --target $(COLAB)/numpy-2.0.2 numpy==2.0.2
	touch $@
