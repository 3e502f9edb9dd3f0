# Thin: each target is the commands that the README shows, in a virtual environment of its own.
TORCH ?= torch==2.13.0
# A CPU build of torch brings no Triton; the tests need one to interpret and compile the CUDA kernels.
TRITON ?= triton==3.6.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles what it imports, which is little of what torch and its like hold.
PIP := $(BIN)/pip install --quiet --no-compile

.PHONY: train test check docs bench kernels sanitize matrix gpu clean

# torch first: with one installed, `torch>=2.10` is satisfied and pip replaces nothing.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"

$(VENV)/installed: $(BIN)/python pyproject.toml setup.py $(shell find csrc fastgan kernels -name '*.py' -o -name '*.h' -o -name '*.inc' -o -name '*.cpp')
	$(PIP) .
	touch $@

# The tests and benchmarks run from the checkout, so it is installed in place, with its kernels built there.
$(VENV)/editable: $(BIN)/python pyproject.toml setup.py $(shell find csrc -type f)
	$(PIP) "$(TRITON)"
	$(PIP) --editable ".[test,check,docs]"
	touch $@

train: $(VENV)/installed
	$(BIN)/fastgan train dcgan --data digits --out runs/dcgan

# A file of tests stays together, as some share what took long to set up. Threads that spin while they wait would slow the
# other processes down.
test: $(VENV)/editable
	OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

check: $(VENV)/editable docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Into build/site. A broken link, a page that nothing leads to and a name that is not there are errors.
docs: $(VENV)/editable
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/editable
	$(BIN)/python -m benchmarks

# Compiles the Triton kernels for every GPU, and writes down what became of them; the tests ask for it when a kernel changes.
kernels: $(VENV)/editable
	$(BIN)/python tests/ahead_of_time.py

# Builds the C++ kernels for AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, and runs the operators' tests.
sanitize: $(VENV)/editable
	$(BIN)/python tests/sanitize.py

# The tests with one wheel over the versions of Python, torch and numpy that can be installed here.
matrix:
	$(PYTHON) tests/matrix.py

# On a machine with CUDA where nothing can be downloaded: uses the Python that is there.
gpu:
	$(PYTHON) -m benchmarks.gpu

clean:
	rm -rf $(VENV) build dist *.egg-info
