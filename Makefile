# `make demo` and `make test` need only Python with venv: they install what they use into .venv, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

DEMO_PROMPT ?= a red apple
DEMO_IMAGE ?= docs/images/apple.png
DEMO_OUTPUT ?= builds/demo.png

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/icexport build --cond canny --output builds/canny
	$(BIN)/icexport generate builds/canny --prompt "$(DEMO_PROMPT)" --image $(DEMO_IMAGE) --output $(DEMO_OUTPUT)
	@echo "The picture is $(DEMO_OUTPUT)"

# One thread for each of the test processes.
test: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/pytest -n 2

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m icexport._preflight
	touch $@

clean:
	rm -rf $(VENV) builds build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
