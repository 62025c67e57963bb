# make alone says what there is. Variables: PYTHON (3.11 or newer), VENV (.venv), DATA (a folder for the demo), WORKERS (tests at a time),
# POSTGRES_IMAGE (what integration starts).
VENV ?= .venv
DATA ?=
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN = $(VENV)/bin
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check
LOCK = UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --no-emit-index-url
# Tests that need no server, or our own one, or that say nothing about which one it is.
NOT_IN_CONTAINER = $(wildcard $(addprefix tests/test_,embedded.py contours.py dicom.py docs.py layers.py package.py shares.py \
	synthetic.py overlay.py ring.py isolation.py access.py header.py manifest.py rtstruct.py seg.py geometry.py nifti.py idx.py cache.py \
	raster.py table.py pattern.py layout_sunnybrook.py measure.py all_files.py layouts.py executors.py remote.py ingest_scale.py \
	crashes.py top.py readme.py nearness.py shapes.py rulefiles.py gallery.py plots.py qa_docs.py rules_mask.py shift.py \
	faults.py ingest_errors.py interpolate.py threshold.py export.py private.py privacy_docs.py pseudonyms.py planted.py \
	decode.py named.py ingest.py feed.py ranks.py million.py sunnybrook.py flags.py aio.py transforms.py intensity.py sequences.py \
	sequence_stream.py fed_changed.py sampling_page.py frameworks_*.py feed_gallery.py constants.py fed_sets.py neighbours.py \
	rules_file.py rules_relation.py rules_series.py))
# Tests wait for processes more than they compute. A file's tests stay in one process, as they share what it made; tests/conftest.py has the order.
# A process that crashed is not replaced: pytest-xdist (3.8) then waits for ever for what is left of its file.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0
WORKERS ?= 3

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint soak bench frameworks integration lock clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

venv: $(VENV)/.dev ## .venv with the package and what its tests need, as locked
demo: $(VENV)/.runtime ## from a folder of studies to batches; DATA=FOLDER takes your own
	$(BIN)/python examples/demo.py $(DATA)

test: $(VENV)/.dev lint ## style, types, tests on the embedded PostgreSQL
	$(PYTEST)

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(VENV)/.dev ## trainings and ingests under hundreds of deaths, fuzzing; takes long
	$(BIN)/python -m pytest -m soak -s -q -o faulthandler_timeout=0

frameworks: $(VENV)/.frameworks ## PyTorch, Keras, JAX and TensorFlow: their tests, and examples that train; installs them
	$(BIN)/python -m pytest -n 2 --dist loadfile $(wildcard tests/test_frameworks_*.py)
	@# Each says last how good it became: a Dice of 0.5 or more, which a model that learned nothing does not have.
	cd examples && printf '%s\n' keras_fit unet_torch jax_step | xargs -P 2 -I {} sh -ec 'CATALOG_HOME=$$(mktemp -d); \
		chmod 711 $$CATALOG_HOME; export CATALOG_HOME; $(abspath $(BIN))/python {}.py > $$CATALOG_HOME/said; \
		said=$$(tail -n 1 $$CATALOG_HOME/said); echo "{}: $$said"; echo "$$said" | grep -Eq "held-out patient:? (0\.[5-9]|1\.)"'

bench: $(VENV)/.bench ## feeding and ingesting, measured; installs torch
	$(BIN)/python benchmarks/feed.py
	$(BIN)/python benchmarks/guarantees.py
	$(BIN)/python benchmarks/ingest.py
	$(BIN)/python benchmarks/qa.py
	$(BIN)/python benchmarks/transforms.py
	$(BIN)/python benchmarks/sequences.py

integration: $(VENV)/.dev ## the tests on PostgreSQL in a container; needs Docker
	$(PYTEST) --postgres container $(addprefix --ignore=,$(NOT_IN_CONTAINER))

lock: $(BIN)/python ## write the lock files anew, with the newest versions
	$(BIN)/pip install --quiet uv
	$(LOCK) --upgrade --output-file requirements.lock
	$(LOCK) --upgrade --extra dev --constraint requirements.lock --output-file requirements-dev.lock

clean: ## remove what make made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist .demo

# The stamps say what is installed. The demo takes the runtime packages alone.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer was found; say make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements.lock pyproject.toml | $(BIN)/python
	$(INSTALL) -r requirements.lock
	$(INSTALL) --no-deps --editable .
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime
	$(INSTALL) -r requirements-dev.lock
	@touch $@

$(VENV)/.frameworks: requirements-frameworks.txt $(VENV)/.dev
	$(INSTALL) --no-compile -r requirements-frameworks.txt
	@# pip would compile what it installed on one core, for as long as it took to install it; some of it is not meant to compile.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib > /dev/null 2>&1 || true
	@touch $@

$(VENV)/.bench: $(VENV)/.runtime
	$(INSTALL) --constraint requirements.lock --editable '.[bench]'
	@touch $@
