# Needs GNU make and bash; `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup pretrain test test-quick test-matrix test-gpu memcheck bench bench-step check docs format clean

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
TORCH ?= $(shell sed -n '/^torch==/p' constraints.txt)
CONFIG ?= configs/quickstart.yaml
ARGS ?=
PYTEST_ARGS ?=
SLURM ?=

# Activates the virtual environment in a recipe, also on PATH, where torch's extension builder looks for ninja.
ACTIVATE = VIRTUAL_ENV="$$(cd "$(VENV)" && pwd)"; PATH="$$VIRTUAL_ENV/bin:$$PATH"; export VIRTUAL_ENV PATH

# $(call stage,LABEL,COMMAND): one progress line with the time taken; shows the output of COMMAND only if it fails.
stage = printf '%s' "$(1) ..."; start=$$SECONDS; \
	out=$$( { $(2); } 2>&1) || { code=$$?; printf ' failed\n%s\n' "$$out" >&2; exit $$code; }; \
	echo " $$((SECONDS - start)) s"

help: ## list the targets (the default)
	@echo "make TARGET [VARIABLE=value ...]"
	@echo
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1 \2/p' $(firstword $(MAKEFILE_LIST)) | \
		while read -r target text; do printf '  %-11s %s\n' "$$target" "$$text"; done
	@echo
	@echo "Variables:"
	@echo "  CONFIG       configuration file of pretrain; now $(CONFIG)"
	@echo "  ARGS         arguments for bench-step; overrides for pretrain, such as ARGS='train.steps=20 run.name=try'"
	@echo "  NPROC        number of processes of pretrain; default: one per visible GPU, or 2 on a CPU"
	@echo "  PYTEST_ARGS  arguments for pytest, such as PYTEST_ARGS='-x -k mosa', or '-n 8' for 8 workers instead of 2"
	@echo "  SLURM        SLURM=install: test first installs slurm-wlm and munge with apt (as root), which tests/slurm"
	@echo "               needs; without them these tests are reported as not run"
	@echo "  PYTHON       Python 3.11, 3.12 or 3.13 for the virtual environment; now $(PYTHON)"
	@echo "  VENV         the virtual environment; now $(VENV)"
	@echo "  TORCH        the torch to install: a requirement or a wheel; now $(TORCH)"
	@echo "  PIP_ARGS     arguments for every pip install. pip's default torch is a large CUDA build; for another CUDA"
	@echo "               release, or the much smaller CPU-only build, give the package index that has it:"
	@echo "               PIP_ARGS='--extra-index-url URL' (torch's installation page lists the URLs)"
	@echo "  TORCH and PIP_ARGS take effect at set-up; to change them later, remove $(VENV) first."

setup: $(VENV)/.installed ## create the virtual environment with the pinned dependencies

# Once installed, torch and the triton that its CUDA builds bring are left out of the pins: the user may have chosen
# another torch, which requires its own triton. The pins are also set in the environment (PIP_CONSTRAINT for pip before
# 25.3, PIP_BUILD_CONSTRAINT since), because only then do they apply to setuptools in pip's isolated builds. Builds must
# stay isolated: if DeepSpeed's setup finds a CUDA build of torch, it requires the CUDA toolkit.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(call stage,[1/4] prerequisites,launch/prerequisites.sh "$(PYTHON)")
	@$(call stage,[2/4] virtual environment $(VENV),"$(VENV)/bin/python" -m pip --version >/dev/null 2>&1 || \
		"$(PYTHON)" -m venv --clear "$(VENV)")
	@$(call stage,[3/4] $(TORCH) (the largest download),"$(VENV)/bin/python" -m pip install -qq $(PIP_ARGS) "$(TORCH)")
	@pinned_by_user=torch; if "$(VENV)/bin/python" -c 'import triton' 2>/dev/null; then pinned_by_user='torch|triton'; fi; \
		sed -E "/^($$pinned_by_user)==/d" constraints.txt > "$(VENV)/constraints.txt"
	@$(call stage,[4/4] all other dependencies,PIP_CONSTRAINT="$(VENV)/constraints.txt" \
		PIP_BUILD_CONSTRAINT="$(VENV)/constraints.txt" DS_BUILD_OPS=0 \
		"$(VENV)/bin/python" -m pip install -qq --use-pep517 $(PIP_ARGS) -c "$(VENV)/constraints.txt" -e '.[dev]')
	@touch $@

pretrain: setup ## build corpus, tokenizer and dataset, then pretrain a model and write its report
	@$(ACTIVATE); mosa data build "$(CONFIG)" $(ARGS)
	@$(ACTIVATE); launch/torchrun/local.sh "$(CONFIG)" $(ARGS)

test: setup ## run all tests; SLURM=install installs Slurm for tests/slurm first
	@case '$(SLURM)' in \
		'') ;; \
		install) launch/slurm/install.sh ;; \
		*) echo 'error: SLURM must be install or empty, got $(SLURM)' >&2; exit 2 ;; \
	esac
	@$(ACTIVATE); OMP_NUM_THREADS=1 python -m pytest -n 2 $(PYTEST_ARGS) tests

# Unit tests, kernels on the naive path, one distributed and one integration run.
QUICK = tests/unit $(addprefix tests/kernels/test_,naive.py documents.py window.py dispatch.py) \
	'tests/distributed/test_parity.py::test_training_does_not_depend_on_the_layout[(3, 2, True, 4)]' \
	tests/integration/test_pretrain.py::test_contents_of_a_run_directory

test-quick: setup ## run the most informative tests in the least time, for the inner loop
	@$(ACTIVATE); OMP_NUM_THREADS=1 python -m pytest -n 2 $(PYTEST_ARGS) $(QUICK)

test-matrix: setup ## save at every layout, load at every other, and compare weights and moments bit by bit
	@$(ACTIVATE); python -W ignore -m tests.distributed.test_layouts

test-gpu: setup ## run the tests that need a GPU
	@$(ACTIVATE); python -m pytest $(PYTEST_ARGS) tests/gpu

memcheck: setup ## check every kernel for bad memory accesses on a GPU, with CUDA's compute-sanitizer
	@$(ACTIVATE); compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.gpu.memcheck

bench: setup ## measure the kernels on a GPU; results go to benchmarks/results
	@$(ACTIVATE); python -m benchmarks.mosa_layer && python -m benchmarks.scaling

bench-step: setup ## measure whole training steps on a GPU; ARGS='NAME ... --out FILE' selects which
	@$(ACTIVATE); python -m benchmarks.step $(ARGS)

check: setup docs ## check lint, formatting, types and documentation: ruff, pyright, Sphinx
	@$(ACTIVATE); ruff check . && ruff format --check . && pyright

docs: setup ## build the documentation site in build/docs; warnings, such as broken links, are errors
	@$(ACTIVATE); python -W ignore -m sphinx -W -q -b html docs build/docs

format: setup ## let ruff fix formatting and whatever else it can
	@$(ACTIVATE); ruff check --fix . && ruff format .

clean: ## remove caches and build output, but not data, runs or the virtual environment
	rm -rf .cache .pytest_cache .ruff_cache build dist site *.egg-info
	find . -type d \( -path ./.git -o -path "./$(VENV)" -o -path ./data -o -path ./runs \) -prune \
		-o -type d -name __pycache__ -exec rm -rf {} +
