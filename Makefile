# Everything from a fresh machine: python3 (3.10 or newer), make, a C++ compiler, a package index.
#
#   make test    the test suite, lint and types      make demo    the main job on the embedded model
#   make slow    the long tests too                  make lint    ruff and mypy only
#   make bench   against other runtimes (VITQ_DATA)  make clean   remove .venv and what was built
#   make acceptance   accuracy, size and proofs (VITQ_DATA)

# The first of these that is at least Python 3.10 makes the virtual environment.
PYTHONS ?= python3 python3.13 python3.12 python3.11 python3.10
VENV := .venv
STAMP := $(VENV)/.installed
BENCH := $(VENV)/.bench
PY := $(VENV)/bin/python
JOBS ?= 2
PYTEST_ARGS ?=

.PHONY: venv test slow demo bench acceptance lint clean

venv: $(STAMP)

$(STAMP): setup.cfg pyproject.toml
	@set -e; \
	if [ ! -x $(PY) ]; then \
	  for python in $(PYTHONS); do \
	    if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' \
	         >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "no Python >= 3.10 with venv among: $(PYTHONS); install one or say make PYTHONS=/path/to/python3" >&2; \
	    exit 1; \
	  fi; \
	  echo "making $(VENV) with $$($$found --version)"; \
	  $$found -m venv $(VENV); \
	fi
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m mypy

test: lint
	$(PY) -m pytest -n $(JOBS) $(PYTEST_ARGS)

slow: lint
	$(PY) -m pytest -n $(JOBS) --slow $(PYTEST_ARGS)

demo: $(STAMP)
	$(PY) -m tvm_vitq.demo

$(BENCH): $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[test,bench]'
	@touch $@

bench: $(BENCH)
	$(PY) -m benchmarks.compare

acceptance: $(STAMP)
	$(PY) -m benchmarks.acceptance

clean:
	rm -rf $(VENV) build demo *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
