# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/pip --disable-pip-version-check

.PHONY: demo bench bench-gpu test test-fast lint clean

demo: $(VENV)/.installed
	$(BIN)/pnp-batch run manifests/quickstart.yaml

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/throughput.py --size shapes
	$(BIN)/python benchmarks/throughput.py --size shapes --inversion fixed-point
	$(BIN)/python benchmarks/throughput.py --size mid --images 2 --prompts 2

bench-gpu: $(VENV)/.installed
	for size in sd15 sd21 sdxl; do \
		$(BIN)/python benchmarks/throughput.py --size $$size --prompts 1 --repeats 1 || exit 1; \
	done
	$(BIN)/python benchmarks/throughput.py --size sd15 --prompts 4 --repeats 1
	$(BIN)/python benchmarks/compiled.py --size sd15 --rows 16 --compile

test: $(VENV)/.installed-dev lint
	$(BIN)/pytest

test-fast: $(VENV)/.installed-dev
	$(BIN)/pytest -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) outputs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
