# `make` lists the commands. Settings: PYTHON (the Python that makes the environment), VENV (where it is).

PYTHON ?= python3
VENV ?= .venv

PY := $(VENV)/bin/python
# Written last and in one step, so that an interrupted installation is repeated.
INSTALLED := $(VENV)/.installed
# The tests' matrices are small: a second thread costs more than it saves, above all on busy cores.
QUIET := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
# One process runs all tests of a file, so that a fixture of a file is made once.
PYTEST := $(QUIET) $(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo app viewer test test-fast test-slow test-common test-oldest lint sync household benchmark card clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: $(INSTALLED)  ## make the environment; the other commands do it if it is missing or out of date

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (minutes the first time)"
	@$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt torch==2.13.0 -e ".[dev]"
	@touch $@.new && mv $@.new $@

demo: $(INSTALLED)  ## describe three real objects with the bundled checkpoint
	@HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 $(PY) demo/demo.py

app: $(INSTALLED)  ## open a page to see objects in 3D and talk about them
	@HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 $(VENV)/bin/minigpt3d demo

viewer:  ## bundle the page's 3D view with three.js (needs npm)
	@cd page/viewer && npm ci --no-audit --no-fund && npm run --silent build

test: $(INSTALLED)  ## run the tests but the slow ones: offline, on the CPU
	@$(PYTEST) $(ARGS)

test-fast: $(INSTALLED)  ## run unit tests and goldens (about 2 minutes on two quiet cores)
	@$(PYTEST) tests/unit tests/golden $(ARGS)

# pytest exits with 5 if there is no test to run.
test-slow: $(INSTALLED)  ## run the slow tests
	@$(PYTEST) -m 'slow and not gpu and not network' $(ARGS) || test $$? -eq 5

# transformers' tests of all models are in its source distribution alone.
SOURCE := $(VENV)/transformers-source

test-common: $(SOURCE)  ## run transformers' own tests of a model on this one
	@TRANSFORMERS_SOURCE=$(SOURCE) $(PYTEST) --dist load -rs -W ignore::pytest.PytestUnknownMarkWarning tests/e2e/test_transformers_common.py $(ARGS)

$(SOURCE): $(INSTALLED)
	@rm -rf $@ $@.new && mkdir $@.new
	@$(PY) -m pip download -qq --disable-pip-version-check --no-deps --no-binary transformers -d $@.new \
	  transformers==$$($(PY) -c 'from importlib.metadata import version; print(version("transformers"))')
	@tar -xzf $@.new/*.tar.gz -C $@.new --strip-components 1 && rm $@.new/*.tar.gz
	@mv $@.new $@ && touch $@

# The oldest libraries lie in front of those of VENV, which has all others. TORCH=2.6.0 adds an older torch (3 GB).
# pip lists those that need newer ones, such as trl: the tests below do not import them.
OLDEST := $(VENV)-oldest$(addprefix -torch-,$(TORCH))
# The tests that use these libraries most.
OLDEST_TESTS := $(addprefix tests/,golden unit/test_modeling.py unit/test_generation.py unit/test_pipeline.py unit/test_processing.py \
  unit/test_weights.py unit/test_train_step.py unit/test_stream.py unit/test_pack.py e2e/test_hub.py e2e/test_saves.py e2e/test_training.py)

test-oldest: $(OLDEST)/.installed  ## run tests with the oldest libraries allowed; with an older torch: TORCH=2.6.0
	@$(OLDEST)/bin/python tests/tools/check_versions.py constraints-oldest.txt $(if $(TORCH),,--except torch)
	@$(QUIET) $(OLDEST)/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(OLDEST_TESTS) $(ARGS)

$(OLDEST)/.installed: $(INSTALLED) constraints-oldest.txt
	@rm -rf $(OLDEST) && $(PY) -m venv $(OLDEST)
	@$(PY) -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" \
	  > $$($(OLDEST)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/others.pth
	@grep -v -e '^#' -e '^torch==' constraints-oldest.txt | xargs $(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check $(addprefix torch==,$(TORCH))
	@touch $@

lint: $(INSTALLED)  ## check style, format and the direction of imports
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/lint-imports --no-cache

sync: $(INSTALLED)  ## renew the code files in the bundled checkpoint
	@$(PY) -c "from minigpt3d import hub; hub.write_code(hub.BUNDLED_MODEL)"

household: $(INSTALLED)  ## rebuild the bundled checkpoint: make household LIBRARIES="one.sh3f two.sh3f"
	@test -n "$(LIBRARIES)" || { echo 'LIBRARIES is not set. Give Sweet Home 3D furniture libraries (.sh3f): make household LIBRARIES="one.sh3f two.sh3f"' >&2; exit 2; }
	@$(PY) -m minigpt3d.recipes.household $(LIBRARIES)

benchmark: $(INSTALLED)  ## time the encoder beside the plain published algorithm
	@$(PY) benchmarks/encode.py $(ARGS)

card: $(INSTALLED)  ## check and time everything on a GPU within 8 minutes, into build/card.jsonl
	@HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 $(PY) benchmarks/card.py $(ARGS)

clean:  ## remove the environment and build files
	@rm -rf $(VENV) $(VENV)-oldest* build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
