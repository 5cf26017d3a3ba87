# Main targets:
#
# make demo         install the pinned environment, run three SPPO iterations on the embedded model
#                   and instructions with verifiable constraints, and a control; print the result
# make demo-all     the same, and every other evaluation, the K = 2 run, the papers' tables and a
#                   report
# make compare      SPPO, SPPO hard, DPO, IPO, INPO and MPO with equal budgets, and a table of them
# make compare-all  every run of config/config.yaml; resumes an interrupted comparison
# make estimate CONFIG=config/presets/mistral-7b.yaml
#                   the expected cost: GPU-hours, memory, disk, dollars;
#                   FLAGS="--gpu A100 --price 2" sets the GPU and its price
# make stale        list the artifacts that older code made
# make verify       compare every artifact below results/ (or RESULTS=folder) with its record;
#                   FIX=1 rebuilds broken records
# make install      install the pinned environment into .venv
#
# Tests:
#
# make test         install the pinned environment, run the tests; PRECISION=bfloat16 or float32
#                   runs them as on a CPU with or without bfloat16 units
# make test-unit    only the fast tests, without the workflow
# make test-slow    the slow tests: fuzzing (tests/fuzz; FUZZ=5 runs five seeds), parity, real runs
# make test-conda   create the conda environments, run a tiny workflow in them (15 minutes)
# make test-pairrm  compare PairRM with llm-blender, in a separate environment in .cache/
# make test-slurm   run the workflow on a real Slurm of one machine; apt-get installs Slurm if it is
#                   missing (needs root, on Debian or Ubuntu)
# make test-vllm    install vLLM's CPU build into .cache/vllm, run the engine vllm on the embedded
#                   policy (15 minutes)
# make lint         check formatting, lint and types with ruff, snakefmt and mypy
# make format       format the code
#
# Variables:
#
# TORCH_INDEX       PyTorch's package index, such as https://download.pytorch.org/whl/cpu for the
#                   small CPU build
# PYTHON            the Python, 3.11 or newer, that creates .venv

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check
SNAKEMAKE := .venv/bin/snakemake --cores all
# Each test file runs in one worker. The files that take longest start first, so that no worker has
# one alone at the end.
LONGEST := tests/workflow tests/unit/test_rules.py tests/unit/test_training.py
PYTEST_PARALLEL := .venv/bin/python -m pytest -q --numprocesses auto --maxprocesses 4 \
	--dist loadfile --no-loadscope-reorder $(if $(PRECISION),--auto-precision $(PRECISION))

# These targets show all evaluations that exist, so they are made after the evaluations.
SUMMARIES := paper_tables results/tables/evaluations.html results/tables/methods.html \
	results/figures/pairwise_ranker.svg results/figures/pairwise_judge.svg

.PHONY: demo demo-all compare compare-all install estimate stale verify lint format
.PHONY: test test-unit test-slow test-conda test-slurm test-pairrm test-vllm

demo: .venv/installed
	@$(SNAKEMAKE) results/iter3/alpaca_eval.json results/summary.md
	@cat results/summary.md

demo-all: .venv/installed
	@$(SNAKEMAKE) everything
	@$(SNAKEMAKE) $(SUMMARIES)
	@$(SNAKEMAKE) --report results/report.html -- everything $(SUMMARIES)
	@cat results/summary.md results/k2/summary.md results/iter3/best_of_n.csv \
		results/tables/evaluations.md results/tables/measured.md
	@echo "Open results/report.html in a browser"

compare compare-all: .venv/installed
	@$(SNAKEMAKE) --keep-going $(subst -,_,$@)
	@$(SNAKEMAKE) results/tables/methods.html
	@cat results/tables/methods.md

install: .venv/installed

.venv/installed: requirements.txt requirements-no-deps.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; set a newer one:" \
			"PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing the pinned environment into .venv (one to three minutes)"
	@$(PYTHON) -m venv .venv
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps -r requirements-no-deps.txt
	@touch $@

lint: .cache/lint/installed .venv/installed
	@.cache/lint/bin/ruff format --check src tests benchmarks
	@.cache/lint/bin/ruff check src tests benchmarks
	@.cache/lint/bin/snakefmt --check Snakefile rules
	@.cache/lint/bin/mypy --python-executable .venv/bin/python

format: .cache/lint/installed
	@.cache/lint/bin/ruff format src tests benchmarks
	@.cache/lint/bin/ruff check --fix src tests benchmarks
	@.cache/lint/bin/snakefmt Snakefile rules

.cache/lint/installed: requirements-lint.txt
	@$(PYTHON) -m venv .cache/lint
	@.cache/lint/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-lint.txt
	@touch $@

test: .venv/installed
	@$(PYTEST_PARALLEL) $(LONGEST) tests/unit tests/benchmarks

test-unit: .venv/installed
	@$(PYTEST_PARALLEL) tests/unit

test-slow: .venv/installed
	@.venv/bin/python -m pytest -q -m slow

test-conda: .venv/installed
	@$(if $(TORCH_INDEX),PIP_EXTRA_INDEX_URL=$(TORCH_INDEX)) .venv/bin/python -m pytest -q \
		-m slow tests/conda

test-slurm: .venv/installed
	@.venv/bin/python -m pytest -q -rs -m slow tests/slurm

test-pairrm: .venv/installed
	@.venv/bin/python -m pytest -q -m slow tests/parity/test_pairrm_parity.py

estimate: .venv/installed
	@.venv/bin/python src/tools/estimate_cost.py --config $(CONFIG) $(FLAGS)

test-vllm: .venv/installed .cache/vllm/installed
	@$(SNAKEMAKE) results/models/SmolLM2-135M-Instruct
	@.cache/vllm/bin/python -m pytest -q -rs -m slow tests/vllm

.cache/vllm/installed: VLLM_PIP = \
	.cache/vllm/bin/python -m pip install --quiet --disable-pip-version-check
.cache/vllm/installed: tests/vllm/requirements.txt
	@echo "Installing vLLM's CPU build into .cache/vllm (3.7 GB)"
	@$(PYTHON) -m venv .cache/vllm
	@$(VLLM_PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(VLLM_PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		-r tests/vllm/requirements.txt
	@.cache/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

stale: .venv/installed
	@.venv/bin/python src/tools/list_stale.py results

verify: .venv/installed
	@.venv/bin/python src/tools/verify_results.py $(if $(FIX),--fix) $(or $(RESULTS),results)
