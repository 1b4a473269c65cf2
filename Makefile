# Everything that needs Python runs in .venv, which `setup` makes once (uv when present, else pip).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.llmalign-installed
# A plain path entry: the default finder loses to a folder called llmalign, which a clone's parent is sure to hold.
EDITABLE := --config-settings editable_mode=compat -e
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: help setup quickstart quickstart-images test test-all lint format claims bench bench-images bench-evaluation clean

help:
	@echo "make quickstart   align a small language model and measure it (about 4 minutes, no download)"
	@echo "make quickstart-images  the same with a small image model of digits"
	@echo "make test         the test suite (make test-all: the slow ones too)"
	@echo "make lint         ruff, format check, mypy"
	@echo "make claims       what the papers claim, measured (two hours on two idle cores)"
	@echo "make bench        time and memory of a step beside TRL (two hours; ARGS='--case k8' runs one case)"
	@echo "make bench-images  the same for images, beside a plain reading of the public scripts (an hour)"
	@echo "make bench-evaluation  how long win rates and their report take (a minute)"

setup: $(STAMP)

# torch first and with pip: a CPU build may lie where only pip is configured to look.
$(STAMP): pyproject.toml constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "TRL 1.16 needs Python 3.11 or newer, and $(PYTHON) is older: make setup PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	@if command -v uv >/dev/null && echo "installing with uv" && \
	  uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt $(EDITABLE) '.[dev]'; then true; \
	else echo "installing with pip" && \
	  $(BIN)/python -m pip install --quiet -c constraints.txt $(EDITABLE) '.[dev]'; fi
	@touch $@

quickstart: setup
	$(BIN)/llmalign quickstart

quickstart-images: setup
	$(BIN)/llmalign quickstart --images

test: setup
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

test-all: setup
	$(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

claims: setup
	$(BIN)/python scripts/claims/run.py

bench: setup
	$(BIN)/python scripts/bench.py $(ARGS)

bench-images: setup
	$(BIN)/python scripts/bench_images.py $(ARGS)

bench-evaluation: setup
	$(BIN)/python scripts/bench_evaluation.py
	$(BIN)/python scripts/bench_report.py

clean:
	rm -rf $(VENV) build dist *.egg-info
