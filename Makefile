# `make demo` and `make test` start from a bare machine: Python 3.11 or later, and no more. Both
# install Gemma 3 270M, 240 MB, to which Gemma's terms of use apply: ai.google.dev/gemma/terms
# `make test-quick` takes about a minute, on the backend that KERAS_BACKEND names (default: jax).

PYTHON ?= python3
DEMO := .venv
TEST := .venv-test
SOURCES := pyproject.toml $(shell find keras_gemma presets -type f -not -name '*.pyc')

.PHONY: demo test test-quick test-extras test-oldest docs lint format clean

demo: $(DEMO)/.installed
	@KERAS_BACKEND=jax $(DEMO)/bin/keras-gemma generate "Photosynthesis is" \
		--model gemma3_270m_q4_k_m --repetition-penalty 1.2 --max-new-tokens 96 --benchmark
	@echo; echo "Try next:"
	@echo "  $(DEMO)/bin/keras-gemma chat                  # a conversation with a tiny model"
	@echo "  $(DEMO)/bin/keras-gemma generate \"ROMEO:\"    # --help lists the options"
	@echo "  source $(DEMO)/bin/activate                   # puts keras-gemma on the PATH"

# One worker runs all tests of a file, because they share models and compiled programs. Workers
# compute in one thread each.
PYTEST := OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 $(TEST)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Every step runs even when one before it failed; the target fails if any did.
test: $(TEST)/.installed
	@status=0; \
	$(TEST)/bin/ruff check . || status=1; \
	$(TEST)/bin/ruff format --check . || status=1; \
	for backend in jax torch tensorflow; do \
		echo "== KERAS_BACKEND=$$backend"; \
		KERAS_BACKEND=$$backend $(PYTEST) || status=1; \
	done; \
	exit $$status

# Some files of each subject; those that compile most are left out.
QUICK := $(filter-out tests/test_examples.py,$(wildcard tests/test_*.py)) tests/parity tests/text \
	tests/quantization tests/model/test_backbone.py tests/model/test_cache.py \
	tests/generation/test_cache.py tests/causal_lm/test_generate.py tests/scoring/test_hooks.py \
	tests/storage/test_hugging_face.py tests/storage/test_keras_preset.py tests/cli/test_generate.py

test-quick: lint
	KERAS_BACKEND=$${KERAS_BACKEND:-jax} $(PYTEST) $(QUICK)

# Each extra by itself in a new environment: gigabytes of downloads. EXTRAS="jax gguf" tests these two.
test-extras:
	$(PYTHON) tests/extras/check.py $(EXTRAS)

# The oldest supported versions, in an environment of their own: gigabytes of downloads, because
# PyPI has this torch only with CUDA libraries. Warnings of old versions are not errors.
OLDEST := .venv-oldest
CORE := tests/model/test_backbone.py tests/model/test_layout_map.py tests/causal_lm/test_generate.py \
	tests/causal_lm/test_fit.py tests/generation/test_samplers.py tests/backend/test_packing.py

test-oldest: $(OLDEST)/.installed
	@status=0; \
	for backend in jax torch tensorflow; do \
		echo "== KERAS_BACKEND=$$backend"; \
		KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -W default $(CORE) || status=1; \
	done; \
	exit $$status

$(OLDEST)/.installed: pyproject.toml tests/oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint tests/oldest.txt \
		--editable ".[jax,torch,tensorflow]" pytest hypothesis
	@touch $@

# Into site/; a link that leads nowhere is an error.
docs: $(TEST)/.installed
	NO_MKDOCS_2_WARNING=1 $(TEST)/bin/python -m mkdocs build --strict

lint: $(TEST)/.installed
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .

format: $(TEST)/.installed
	$(TEST)/bin/ruff check --fix .
	$(TEST)/bin/ruff format .

clean:
	rm -rf $(DEMO) $(TEST) $(OLDEST) build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO)/.installed: $(SOURCES)
	test -x $(DEMO)/bin/python || $(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet ".[jax,gemma3-270m]"
	@touch $@

# The CPU build of torch comes first, on a line of its own: left to the extras, a plain torch
# would bring gigabytes of CUDA libraries. Elsewhere: `make test TORCH=<another requirement>`.
TORCH ?= torch==2.13.0

# llama.cpp, which reads the GGUF files of the tests, comes as source; only its library is built.
LLAMA := -DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_CURL=OFF \
	-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF \
	-DLLAMA_BUILD_SERVER=OFF

$(TEST)/.installed: pyproject.toml
	test -x $(TEST)/bin/python || $(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python -m pip install --quiet $(TORCH)
	CMAKE_ARGS="$(LLAMA)" $(TEST)/bin/python -m pip install --quiet --editable ".[all,dev]"
	@touch $@
