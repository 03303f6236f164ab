# POSIX make and python3 are all it takes. `make help` lists the targets.
.POSIX:

VENV = .venv
PYTHON = $(VENV)/bin/python
MODEL =
SERVE_FLAGS =
BENCH_FLAGS =
SANITIZE_FLAGS =

help:
	@echo 'make demo       set up, then complete a prompt with the bundled model'
	@echo 'make test       set up, then run the tests that need no GPU, and count them'
	@echo 'make setup      make .venv with the pinned packages for this machine (both of the above do)'
	@echo 'make check      lint, format, types, generated documents'
	@echo 'make compile    compile the CPU kernels ahead of time (Triton kernels compile when they are asked for)'
	@echo 'make test-gpu   run tests/gpu on a machine with a GPU; PYTHON=python3 uses its own Python'
	@echo 'make test-gpu-sanitize   the smallest of them under compute-sanitizer; SANITIZE_FLAGS=--tools memcheck'
	@echo 'make bench      benchmarks/cpu_engine.py against transformers; BENCH_FLAGS=--json'
	@echo 'make serve      the server on 127.0.0.1:30000; MODEL=... SERVE_FLAGS=...'

setup:
	@for python in python3 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    exec $$python tools/setup_venv.py; \
	  fi; \
	done; \
	echo 'error: none of python3, python3.13, python3.12, python3.11 is Python 3.11 or newer' >&2; \
	echo 'hint: install Python 3.11 or newer under one of these names' >&2; \
	exit 2

demo: setup
	@$(VENV)/bin/firebox generate --prompt 'def fibonacci(' --max-tokens 64 --temperature 0
	@$(PYTHON) tools/setup_venv.py

# The oldest Triton that is allowed compiles every kernel too, from a folder of its own (188 MB).
# Here and in test-gpu one thread a process: torch's own would stand in each other's way (16 cores, 15
# processes: a reference of 1 s took 234).
# Hypothesis draws the same examples every time and gives each as long as it takes; pytest by itself draws others.
SAME = --hypothesis-profile=ci
test: setup
	@test -d $(VENV)/triton-3.6.0 || \
	  $(PYTHON) -m pip install --quiet --no-deps --target $(VENV)/triton-3.6.0 triton==3.6.0
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(SAME) tests/cpu tests/e2e -m alone
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(SAME) tests/cpu tests/e2e -m 'not alone' --numprocesses 2 --dist worksteal

check: setup
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy
	$(PYTHON) tools/config_docs.py --check
	$(PYTHON) -m tools.models_docs --check

compile: setup
	$(PYTHON) -m firebox.kernels.warm

test-gpu:
	@ls tests/gpu/test_*.py >/dev/null 2>&1 || { echo 'error: there is no GPU code yet, so there are no GPU tests' >&2; exit 1; }
	@if [ '$(PYTHON)' = '$(VENV)/bin/python' ]; then $(MAKE) setup; fi
	$(PYTHON) -m pytest tests/gpu -m 'gpu and alone'
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/gpu -m 'gpu and not alone' --numprocesses 8 --dist worksteal

test-gpu-sanitize:
	@if [ '$(PYTHON)' = '$(VENV)/bin/python' ]; then \
	  $(MAKE) setup && \
	  $(PYTHON) -m pip install --quiet --constraint constraints-cuda.txt --editable '.[sanitize]'; fi
	$(PYTHON) tools/sanitize.py $(SANITIZE_FLAGS)

bench: setup
	$(PYTHON) benchmarks/cpu_engine.py $(BENCH_FLAGS)

serve: setup
	$(VENV)/bin/firebox serve $(MODEL) $(SERVE_FLAGS)

.PHONY: help setup demo test check compile test-gpu test-gpu-sanitize bench serve
