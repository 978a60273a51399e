PYTHON ?= python3
VENV := .venv
COLAB := .venv-colab
LOWEST := .venv-lowest
RUN := $(VENV)/bin/python
WHEELS := outputs/gpu-wheels

# Bytes that Jupyter takes in one message; by itself 10 MiB, which three phone photos exceed.
UPLOAD := 209715200

.PHONY: demo test test-newest docs docs-outputs lab wheel figures bench growth launches t4 gpu gpu-wheels ram base fuzz kill
demo: $(VENV)/ready  ## personalise the bundled base for a bundled subject
	$(RUN) -m dreambooth_lib demo

test: export DREAMBOOTH_TEST_COLAB_PYTHON = $(abspath $(COLAB))/bin/python
test: export DREAMBOOTH_TEST_LOWEST_PYTHON = $(abspath $(LOWEST))/bin/python
test: $(COLAB)/ready $(LOWEST)/ready test-newest  ## the whole test suite

test-newest: $(VENV)/ready  ## the test suite, without Colab's packages and the oldest ones
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal \
		--durations=50 --durations-min=5

docs: $(VENV)/docs  ## the documentation, readable from disk: outputs/site/index.html
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(RUN) -m mkdocs build --strict --quiet --site-dir outputs/site

docs-outputs: $(VENV)/ready  ## what the notebooks show, for the documentation: docs/notebooks
	OMP_NUM_THREADS=1 $(RUN) -m tools.notebook_outputs $(ARGS)

# Such as ARGS="--only pictures --seed 17 --count 1", to repeat one case.
fuzz: $(VENV)/ready  ## tens of thousands of damaged files, and a failing disk at each kind of write
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(RUN) -m hostile.fuzz $(ARGS)
	$(if $(ARGS),,OMP_NUM_THREADS=1 PYTHONPATH=tests $(RUN) -m hostile.faults --kinds)

kill: $(VENV)/ready  ## kill training 200 times, also two processes of it, and resume it
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(RUN) -m hostile.kills $(ARGS)

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

# The reference's script needs torchvision besides; ARGS="--demo" also times the demo.
bench: $(VENV)/ready  ## a step on the CPU beside its floor and REFERENCE=DIR: outputs/bench.md
	$(RUN) -m tools.bench $(if $(REFERENCE),--reference $(REFERENCE)) $(ARGS)

growth: $(VENV)/ready  ## ten times the class images, photos, ...: outputs/growth-*.md; ARGS=photos
	$(RUN) -m tools.growth $(ARGS)

launches: $(VENV)/ready  ## what a step asks of a GPU, counted without one: outputs/launches.md
	$(RUN) -m tools.launches $(ARGS)

t4: $(VENV)/ready  ## the minutes of a default SD 1.5 run on a T4, counted: outputs/t4_run.md
	$(RUN) -m tools.t4_run $(ARGS)

# With the machine's own Python and packages, and in a folder beside them those of outputs/gpu-wheels.
gpu:  ## what training costs on an NVIDIA GPU, and which ways of it work: outputs/gpu/table.md
	if [ -d $(WHEELS) ] && [ ! -d $(WHEELS)/here ]; then \
	    $(PYTHON) -m pip install --quiet --no-index --no-deps --target $(WHEELS)/here $(WHEELS)/*.whl; fi
	PYTHONPATH=$(WHEELS)/here:$(CURDIR) $(PYTHON) -m tools.bench_gpu --work outputs/gpu \
	    $(if $(REFERENCE),--reference $(REFERENCE))

# For Python 3.12 with CUDA 13; of bitsandbytes only the libraries for that.
gpu-wheels:  ## what make gpu needs besides torch, transformers, accelerate and peft, to take along
	rm -rf $(WHEELS)
	$(PYTHON) -m pip download --quiet --no-deps --dest $(WHEELS) --only-binary=:all: \
	    --python-version 3.12 --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 \
	    diffusers==0.39.0 bitsandbytes tomli_w
	cd $(WHEELS) && $(PYTHON) -m zipfile -e bitsandbytes-*.whl parts && cd parts && \
	    find . -name 'libbitsandbytes_*' ! -name '*_cuda130.so' ! -name '*_cpu.so' -delete && \
	    $(PYTHON) -m zipfile -c $$(ls -d ../bitsandbytes-*.whl) * && rm -r ../parts

ram: $(VENV)/ready  ## what a run takes of a session's memory: outputs/ram/table.md (30 GB of disk)
	$(RUN) -m tools.ram

base: $(VENV)/ready  ## make data/toybox anew (hours)
	$(RUN) -m tools.toybox build

$(VENV)/ready: requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch -c constraints.txt
	$(RUN) -m pip install --quiet -e ".[test]" -c constraints.txt
	touch $@

$(VENV)/docs: $(VENV)/ready constraints-docs.txt
	$(RUN) -m pip install --quiet -e ".[docs]" -c constraints.txt -c constraints-docs.txt
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

# The lowest versions that requirements.txt allows; the library is read from here.
$(LOWEST)/ready: requirements.txt constraints-lowest.txt
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet torch -c constraints-lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet -r requirements.txt pytest -c constraints-lowest.txt
	touch $@
