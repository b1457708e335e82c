# Everything from a fresh machine: python3 (3.10 or newer), make, a C++ compiler, a package index.
#
#   make test    the test suite, lint and types      make demo    the main job on the embedded model
#   make slow    the long tests too                  make lint    ruff and mypy only
#   make bench   against other runtimes (VITQ_DATA)  make clean   remove .venv and what was built
#   make acceptance   accuracy, size and proofs (VITQ_DATA)
#   make cross   on Debian as root: the compilers, emulator and libraries that AArch64 and C++ tests use
#   make cuda    nvcc and nvdisasm from pip, where they are not installed

# The first of these that is at least Python 3.10 makes the virtual environment.
PYTHONS ?= python3 python3.13 python3.12 python3.11 python3.10
VENV := .venv
STAMP := $(VENV)/.installed
BENCH := $(VENV)/.bench
PY := $(VENV)/bin/python
JOBS ?= 2
PYTEST_ARGS ?=

.PHONY: venv cross cuda test slow demo bench acceptance lint clean

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

# Where this cannot be done (no Debian, not root, no package index) those tests skip and say why.
cross:
	@have() { command -v "$$1" >/dev/null 2>&1; }; \
	have aarch64-linux-gnu-g++ && have qemu-aarch64 && ls /usr/bin/llvm-mca-* >/dev/null 2>&1 && \
	  have cmake && have valgrind && [ -e /usr/include/jpeglib.h ] && [ -e /usr/include/png.h ] && exit 0; \
	if ! have apt-get || [ "$$(id -u)" != 0 ]; then \
	  echo "AArch64 or C++ tests will skip: no g++-aarch64-linux-gnu, qemu-user, llvm, cmake, valgrind," \
	    "libjpeg-dev or libpng-dev, and no root with apt-get"; \
	  exit 0; \
	fi; \
	apt-get update -qq; \
	llvm=$$(apt-cache pkgnames llvm- | grep -E '^llvm-[0-9]+$$' | sort -V | tail -n 1); \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	  g++-aarch64-linux-gnu qemu-user $$llvm cmake valgrind libjpeg-dev libpng-dev >/dev/null || \
	  echo "AArch64 and C++ tests will skip: apt-get failed"

# Where nothing can be installed those tests skip and say why.
cuda: $(STAMP)
	@$(PY) -c 'from schedules.cuda.nvcc import find_nvcc, find_nvdisasm; find_nvcc(); assert find_nvdisasm()' \
	  2>/dev/null || \
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[test,cuda]' || \
	  echo "tests that build for NVIDIA GPUs will skip: pip cannot install nvcc"

test: lint cross cuda
	$(PY) -m pytest -n $(JOBS) $(PYTEST_ARGS)

slow: lint cross cuda
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
