# Everything that is done to this repository, by name. `make help` lists it.
# GNU make 3.81 (macOS) is enough.

PYTHON ?= python3
JOBS   ?= 2
ARGS   ?=

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

# Pyright says when a newer one is out; constraints.txt decides that here.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# Material says that MkDocs 2 will differ; this is MkDocs 1.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format docs serve bench-training bench-selection bench-resume bench-tickets bench-files bench-inference bench-pruning bench-sensitivity bench-methods constraints clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv, with all that development needs (PYTHON=python3.12 picks another Python)
	@echo "$(VENV) is ready; try: make demo"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "Gossamer needs Python 3.10 or newer; '$(PYTHON)' is `$(PYTHON) --version 2>&1 | head -1`." >&2; \
	  echo "Name a newer one: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(BIN)/uv: | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt uv

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/native/*) | $(BIN)/uv
	$(BIN)/uv pip install -p $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## train dense, then sparse, on real images; ARGS='--epochs 3' and the like are passed on
	$(BIN)/gossamer demo $(ARGS)

# One thread each: threads of several workers that wait for each other on the same cores are ten times slower.
test: $(STAMP) ## run the tests and the doctests; ARGS='-k schedule' and the like are passed on
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) $(ARGS)

lint: $(STAMP) ## ruff (rules and format), pyright, and the walls between the modules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP) ## let ruff format and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## execute the tutorial and build the site into site/, no warning let through
	$(BIN)/mkdocs build --strict $(ARGS)

serve: $(STAMP) ## the site at http://127.0.0.1:8000, built anew as its pages change
	$(BIN)/mkdocs serve

bench-training: $(STAMP) ## what a training step costs with masks moving, over a dense one
	$(BIN)/python benchmarks/training_overhead.py $(ARGS)

bench-selection: $(STAMP) ## one-shot selection, local and global, over the peers
	$(BIN)/python benchmarks/selection.py $(ARGS)

bench-resume: $(STAMP) ## kill fits, resume them, and compare with fits that were never stopped, bit by bit
	$(BIN)/python benchmarks/resume.py $(ARGS)

bench-tickets: $(STAMP) ## lottery tickets: accuracy over remaining weights, against re-initialised networks
	$(BIN)/python benchmarks/lottery_ticket.py $(ARGS)

bench-files: $(STAMP) ## what ResNet-18 takes on disk at each sparsity, and how fast it loads
	$(BIN)/python benchmarks/file_size.py $(ARGS)

bench-inference: $(STAMP) ## sparse networks beside PyTorch, and ONNX Runtime and OpenVINO where they are installed
	$(BIN)/python benchmarks/inference.py $(ARGS)

bench-pruning: $(STAMP) ## ResNet-18 with fewer filters: size, speed and accuracy, beside the peers
	$(BIN)/python benchmarks/pruning.py $(ARGS)

bench-sensitivity: $(STAMP) ## targets from each layer's sensitivity, against uniform and global ones
	$(BIN)/python benchmarks/sensitivity.py $(ARGS)

bench-methods: $(STAMP) ## accuracy of each method at each sparsity, and one-shot pruning (ARGS='--data FOLDER')
	$(BIN)/python benchmarks/methods.py $(ARGS)

constraints: $(STAMP) ## resolve constraints.txt anew, for every Python and platform at once
	{ echo '# Known-good versions of everything that development installs. Made by `make constraints`.'; \
	  echo uv | $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --upgrade --no-annotate --no-header \
	    --extra dev pyproject.toml - ; } > constraints.new
	@! grep -E '://|@|\.\./' constraints.new
	mv constraints.new constraints.txt

clean: ## remove what was built; .venv stays
	rm -rf build dist site demo-output .pytest_cache .ruff_cache .import_linter_cache .hypothesis .cache constraints.new
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)
