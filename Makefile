PYTHON ?= python3
VENV := .venv
COLAB := .venv-colab
RUN := $(VENV)/bin/python

# Bytes that Jupyter takes in one message; by itself 10 MiB, which three phone photos exceed.
UPLOAD := 209715200

.PHONY: demo test lab wheel figures bench base lint
demo: $(VENV)/ready  ## personalise the embedded base for a bundled subject
	$(RUN) -m dreambooth_lib demo

test: $(VENV)/ready $(COLAB)/ready  ## the whole test suite
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	OMP_NUM_THREADS=1 DREAMBOOTH_TEST_COLAB_PYTHON=$(abspath $(COLAB))/bin/python \
	    $(RUN) -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal

lab: $(VENV)/ready  ## JupyterLab with the notebooks, where photos of 200 MiB in all can be uploaded
	DREAMBOOTH_UPLOAD_LIMIT=$(UPLOAD) $(RUN) -m jupyter lab notebooks/01_dreambooth.ipynb \
	    --ServerApp.tornado_settings='{"websocket_max_message_size": $(UPLOAD)}'

wheel:  ## the kit as one file for Colab, 35 MB: dist/dreambooth_lib-*.whl
	rm -rf build dist/dreambooth_lib-*.whl
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .
	@rm -rf build
	@du -h --apparent-size dist/dreambooth_lib-*.whl

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
