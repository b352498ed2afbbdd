# Two commands: `make demo` and `make test`. Both set everything up first, in .venv.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMPARISON := .venv-llmcompressor
COMPOSER := .venv-composer
DOCS := .venv-docs
TRANSFORMERS4 := .transformers4
LLAMA_CPP := .llama-cpp
# The first Python that is new enough; override with `make PYTHON=/path/to/python …`.
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11 python3.10,$(shell \
	$(name) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $(name))))

.PHONY: demo test lint docs site compare-llmcompressor test-composer test-transformers4 test-llama-cpp setup clean

demo: setup
	$(BIN)/python -m data_tools.demo --output runs/demo-data
	$(BIN)/shear run recipes/demo.yaml

# One thread in each worker: the tests' models are so small that more threads only wait for each other. Workers keep
# neighbouring tests, which share fixtures, and take over from each other at the end.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The tables of keys in docs/, from the recipes' own documentation, and what `shear plan` says of recipes.
docs: setup
	$(BIN)/python -m shearing.runs.recipe docs/recipe.md
	$(BIN)/python -m shearing.pruning.sparse.recipe docs/sparsity.md
	$(BIN)/python -m data_tools.preparation.recipe docs/data.md
	$(BIN)/python recipes/costs.py docs/recipes.md
	$(BIN)/python docs/families_page.py
	$(BIN)/python recipes/plans.py docs/plan.md docs/distributed.md

# The documents as a site in site/, every link checked: mkdocs reads names from the source text, so it needs nothing of
# ours, and has an environment of its own.
site:
	@test -n "$(PYTHON)" || { echo "no Python 3.10 or newer found: make PYTHON=/path/to/python $@" >&2; exit 1; }
	@test -x $(DOCS)/bin/mkdocs || { $(PYTHON) -m venv $(DOCS) && $(DOCS)/bin/python -m pip install \
		--disable-pip-version-check -c constraints.txt mkdocs-material 'mkdocstrings[python]'; }
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# Optional: our masks beside llm-compressor's, in an environment of its own, as it wants other versions of libraries.
compare-llmcompressor:
	@test -n "$(PYTHON)" || { echo "no Python 3.10 or newer found: make PYTHON=/path/to/python $@" >&2; exit 1; }
	@test -x $(COMPARISON)/bin/python || $(PYTHON) -m venv $(COMPARISON)
	$(COMPARISON)/bin/python -m pip install --disable-pip-version-check -e '.[dev]' llmcompressor==0.14.0.1
	OMP_NUM_THREADS=1 $(COMPARISON)/bin/python -m pytest tests/pruning/sparse/test_llmcompressor.py

# Optional: mask learning under Composer, in an environment of its own, as mosaicml wants a torch before 2.7.1.
test-composer:
	@test -n "$(PYTHON)" || { echo "no Python 3.10 or newer found: make PYTHON=/path/to/python $@" >&2; exit 1; }
	@test -x $(COMPOSER)/bin/composer || { $(PYTHON) -m venv $(COMPOSER) && \
		$(COMPOSER)/bin/python -m pip install --disable-pip-version-check -e '.[composer,dev]'; }
	OMP_NUM_THREADS=1 $(COMPOSER)/bin/python -m pytest tests/integrations/composer

# Optional: results opened by transformers 4, in a folder of its own beside the torch of .venv.
test-transformers4: setup
	@test -d $(TRANSFORMERS4)/transformers || $(BIN)/python -m pip install --disable-pip-version-check --no-warn-conflicts \
		--target $(TRANSFORMERS4) transformers==4.57.6
	SHEARING_TRANSFORMERS4=$(TRANSFORMERS4) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/runs/test_transformers4.py

# Optional: GGUF files read by llama.cpp, whose library xllamacpp brings built, in a folder of its own.
test-llama-cpp: setup
	@test -d $(LLAMA_CPP)/xllamacpp || $(BIN)/python -m pip install --disable-pip-version-check --no-deps \
		--only-binary :all: --target $(LLAMA_CPP) xllamacpp==2026.10.11549
	SHEARING_LLAMA_CPP=$(LLAMA_CPP) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/runs/export/test_llama_cpp.py

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.10 or newer found: install one, or make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON): one to five minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "venv failed: it is a package of its own on some systems (Debian: python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[data,deepspeed,demo,dev,lm-eval,lora,ray]'
	@touch $@

clean:
	rm -rf $(VENV) $(COMPARISON) $(COMPOSER) $(DOCS) site $(TRANSFORMERS4) $(LLAMA_CPP) .mypy_cache .pytest_cache .ruff_cache \
		.hypothesis build dist
