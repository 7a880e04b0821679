# Two commands on a fresh machine: `make demo` and `make test`. Everything lives in .venv and build/.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# On machines without a GPU, a CPU build of PyTorch saves gigabytes: give its requirement or wheel here.
TORCH ?= torch
# Not gpu: its FAISS is another package with the same module as the extra faiss brings, and 135 MB.
# What pins the versions of everything that is installed; PINS= takes the newest.
PINS ?= -c constraints.txt
EXTRAS ?= demo,faiss,jpeg,triton,test,dev
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml CMakeLists.txt constraints.txt
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test bench gpu docs lint format setup clean
setup: $(VENV)/.installed

$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PINS) $(TORCH)
	$(BIN)/python -m pip install -q $(PINS) -e '.[$(EXTRAS)]'
	touch $@

demo: setup
	$(BIN)/diffmem demo --out demo

# Side by side, one thread each: threads that spin while they wait would take the cores from the others.
test: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

bench: setup
	$(BIN)/python -m benchmarks

# On a machine with a GPU, with the Python that is there: builds, checks and measures all GPU code in BUDGET seconds.
OUT ?= build/gpu
BUDGET ?= 480
gpu:
	$(PYTHON) -m benchmarks.gpu --out $(OUT) --budget $(BUDGET) $(if $(INTERPRET),--interpret)

# The pages in site/; the build itself fetches nothing, and a warning is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

DOCS := import importlib.metadata as m; print(*(r.split(";")[0] for r in m.requires("diffmem") if "extra == \"docs\"" in r))
$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q $(PINS) $$($(BIN)/python -c '$(DOCS)')
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist site $(VENV) demo *.egg-info diffmem/_C*.so diffmem/_build_info.json
