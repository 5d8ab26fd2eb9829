# Every target works from a bare clone: it makes .venv where absent and installs what the target needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
RECIPE ?= recipes/scenes_tiny.yaml
# Processes of `make test`, each with one thread; a file's tests share one, as they share what was made for them.
WORKERS ?= 2

.PHONY: fit test test-slow checks mutations layouts versions reliability clean

# The main job: a small Step-3.7 learns to describe rendered pictures.
fit: $(VENV)/.run
	$(BIN)/python -m step37_lit fit --config $(RECIPE) $(ARGS)

# Everything that takes seconds; `make test-slow` runs the rest.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow $(ARGS)

# Format, lint, types.
checks: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Table of what the parity tests notice when a feature is taken out of the model.
mutations: $(VENV)/.dev
	$(BIN)/python -W ignore -m tests.parity.mutations

# Every layout on up to four ranks against one rank; writes the table of docs/layouts.md.
layouts: $(VENV)/.dev
	$(BIN)/python -W ignore tests/layouts/table.py $(ARGS)

# Model, training and layouts against newer megatron-cores. They ask for Python 3.12 and run on 3.11; from 0.18 they import
# triton, which torch's builds for CUDA bring along.
VERSIONS ?= 0.17.1 0.18.2 0.19.2
VERSION_TESTS ?= tests/test_step37_model.py tests/test_strategy.py tests/test_mtp.py tests/test_recompute.py \
    tests/test_expert_load.py tests/test_generation.py tests/test_cuda_names.py tests/parity tests/layouts/test_layouts.py
versions: $(VENV)/.dev
	for version in $(VERSIONS); do \
	    folder=$(abspath $(VENV))/megatron-$$version && \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --ignore-requires-python \
	        --target $$folder megatron-core==$$version triton && \
	    PYTHONPATH=$$folder $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(VERSION_TESTS) $(ARGS) || exit 1; \
	done

# Every promise of docs/reliability.md at its full count; writes the figures there.
reliability: $(VENV)/.dev
	$(BIN)/python -W ignore tests/reliability/run.py $(ARGS)

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python setup.cfg pyproject.toml constraints.txt
	$(INSTALL) .
	touch $@

$(VENV)/.dev: $(BIN)/python setup.cfg pyproject.toml constraints.txt
	$(INSTALL) ".[test,dev,notebook]"
	touch $@ $(VENV)/.run
