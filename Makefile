# `make` lists what there is. Settings: PYTHON (which Python makes the environment), VENV (where it lies).

PYTHON ?= python3
VENV ?= .venv

PY := $(VENV)/bin/python
# Written last and in one step: an installation that was cut off is done again.
INSTALLED := $(VENV)/.installed
# A test's matrices are small: a second thread costs more than it gives, above all on busy cores.
QUIET := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

# Files of tests are shared out to processes: what a file prepares is prepared once.
SHARED := -n logical --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo test lint household benchmark clean

help:  ## list the commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

install: $(INSTALLED)  ## make the environment; all others do it where it is missing or out of date

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (minutes the first time)"
	@$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt torch==2.13.0 -e ".[dev]"
	@touch $@.new && mv $@.new $@

demo: $(INSTALLED)  ## describe three real objects with the bundled checkpoint
	@HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 $(PY) demo/demo.py

test: $(INSTALLED)  ## run the tests: offline, on the CPU
	@$(QUIET) $(PY) -m pytest $(SHARED) $(ARGS)

lint: $(INSTALLED)  ## check style and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

household: $(INSTALLED)  ## rebuild the bundled checkpoint: make household LIBRARIES="one.sh3f two.sh3f"
	@test -n "$(LIBRARIES)" || { echo 'LIBRARIES is not set. Give Sweet Home 3D furniture libraries (.sh3f): make household LIBRARIES="one.sh3f two.sh3f"' >&2; exit 2; }
	@$(PY) -m minigpt3d.recipes.household $(LIBRARIES)

benchmark: $(INSTALLED)  ## time the encoder beside the plain published algorithm
	@$(PY) benchmarks/encode.py $(ARGS)

clean:  ## remove the environment and what builds leave behind
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
