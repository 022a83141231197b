# Everything happens in .venv; `make demo` and `make test` work from nothing but python3 (3.11 or
# newer, with venv), g++ and make.

PYTHON ?= python3
# one of the versions of vLLM that the project is tested with; empty: what is there, or the oldest
VLLM ?=
MODEL ?=
ARGS ?=
# test processes; each takes a core, and up to 5 GiB of memory where it starts a server
WORKERS ?= 2
SECONDS ?= 120

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
# A small model that solves problems by long chains of steps.
REASONER := tools/reasoner/trained

EXTENSION_SOURCES := $(shell find csrc -type f 2>/dev/null)
CLANG_FORMAT_FILES := $(filter %.c %.cc %.cpp %.cu %.cuh %.h %.hpp,$(EXTENSION_SOURCES))
MYPY_PATHS := $(wildcard vllm_delta benchmarks tools)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
always:

.PHONY: always help setup demo serve test test-harness soak real-model real-texts bench lint format clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## make .venv with vLLM and this project in it

demo: $(INSTALLED) ## let the reasoner solve problems, full attention and DELTA: make demo [ARGS=...]
	PYTHONPATH=tools $(PY) -m reasoner.demo $(or $(MODEL),$(REASONER)) $(ARGS)

# On a CPU vLLM would take 92 % of the memory for its cache and fail if that much is not free.
serve: export VLLM_CPU_KVCACHE_SPACE ?= 4
serve: $(INSTALLED) ## serve in the foreground: make serve [MODEL=...] [ARGS=...]
	exec $(BIN)/vllm serve $(or $(MODEL),$(REASONER)) --attention-backend DELTA $(ARGS)

# What pytest is asked for in every lane; the results stay in build/.
PYTEST = $(PY) -m pytest --durations=30 --junit-xml=build/results-$@.xml

test: $(INSTALLED) ## run the test suite: make test [ARGS=...] [WORKERS=...]
	$(PYTEST) -n $(WORKERS) --dist loadfile $(ARGS)

test-harness: $(VENV)/.installed-bench $(VENV)/.installed-eval ## test the benchmarks and the accuracy harness
	$(PYTEST) -n $(WORKERS) --dist loadfile tests/harness $(ARGS)

soak: $(INSTALLED) ## a server under many impatient clients: make soak [SECONDS=...]
	SOAK_SECONDS=$(SECONDS) $(PYTEST) -s tests/test_soak.py $(ARGS)

real-model: $(VENV)/.installed-real ## fetch a small pretrained model and print its folder: make real-model [ARGS=FOLDER]
	@$(PY) tools/real_model.py $(ARGS)

real-texts: $(INSTALLED) ## fetch three long texts from Debian's packages: make real-texts [ARGS=FOLDER]
	@$(PY) tools/real_texts.py $(ARGS)

bench: $(VENV)/.installed-bench ## measure decode speed: make bench [ARGS=...]
	$(PY) benchmarks/decode.py $(ARGS)

lint: $(VENV)/.installed-dev $(VENV)/.installed-bench ## check style and types, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=tools $(BIN)/mypy $(MYPY_PATHS)
	$(if $(CLANG_FORMAT_FILES),$(BIN)/clang-format --dry-run --Werror $(CLANG_FORMAT_FILES))

format: $(VENV)/.installed-dev ## bring all files into the checked style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CLANG_FORMAT_FILES),$(BIN)/clang-format -i $(CLANG_FORMAT_FILES))

clean: ## remove what was built, keep .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find vllm_delta -name '*.so' -delete
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed*

distclean: clean ## remove .venv as well
	rm -rf $(VENV)

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  f"Python 3.11 or newer is needed, this is {sys.version}; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# The interpreter is order-only: its file time says nothing about what is installed. Whoever names a version of
# vLLM wants it now.
$(INSTALLED): $(if $(VLLM),always) setup.py pyproject.toml tools/install_vllm.py vllm_delta/integration/compat.py $(EXTENSION_SOURCES) | $(PY)
	$(PY) tools/install_vllm.py $(VLLM)
	$(PIP) install --no-build-isolation -e ".[test]"
	@touch $@

# Only what the extra names: installing the project again would build the extension again.
$(VENV)/.installed-%: pyproject.toml $(INSTALLED)
	$(PY) -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*project["optional-dependencies"]["$*"], sep="\n")' > $@.txt
	$(PIP) install -r $@.txt
	@rm $@.txt
	@touch $@
