# make demo    installs the pinned environment, runs three SPPO iterations on the embedded model, prints the result
# make demo-all  the same, and every other evaluation, the K = 2 run, the papers' tables and a report
# make test    installs the pinned environment, runs the tests
#              PRECISION=bfloat16 or float32: as on a processor with bfloat16 units, or without
# make test-unit  the fast ones of them, without the workflow
# make lint    formatting, lint and types, by ruff, snakefmt and mypy; make format formats
# make test-slow  the slow ones: fuzzing (tests/fuzz; FUZZ=5 five seeds), parity, real runs
# make test-conda  makes the conda environments and runs a tiny workflow in them (a quarter of an hour)
# make test-pairrm  PairRM against llm-blender itself, in an environment of its own below .cache/
# make estimate CONFIG=config/presets/mistral-7b.yaml   what it will cost: GPU-hours, memory, disk, dollars; FLAGS="--gpu A100 --price 2"
# make compare      SPPO, SPPO hard, DPO, IPO, INPO and MPO with equal budgets, and a table of them (an hour on 2 cores after the demo)
# make compare-all  every run of config/config.yaml; goes on where it stopped
# make test-slurm  runs the workflow on a real Slurm of one machine, installed by apt-get where it is missing (root, Debian or Ubuntu)
# make test-vllm  makes .cache/vllm with vLLM's CPU build and runs the engine vllm on the embedded policy (a quarter of an hour)
# make stale   lists artifacts that older code made
# make verify  checks every artifact below results/, or RESULTS=folder, against its record; FIX=1 rebuilds broken records
#
# TORCH_INDEX  PyTorch's package index, such as https://download.pytorch.org/whl/cpu for the small CPU build
# PYTHON       the Python 3.11+ that .venv is made with

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check
SNAKEMAKE := .venv/bin/snakemake --cores all
# A file of tests is one worker's. The workflow begins, for it takes longest.
PYTEST_PARALLEL := .venv/bin/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(if $(PRECISION),--auto-precision $(PRECISION))

# These take whatever evaluations have been made, so they come after them.
OF_WHAT_IS_THERE := paper_tables results/tables/evaluations.html results/tables/methods.html results/figures/pairwise_ranker.svg results/figures/pairwise_judge.svg

.PHONY: demo demo-all compare compare-all install test test-unit test-slow test-conda test-slurm test-pairrm estimate test-vllm stale verify lint format

demo: .venv/installed
	@$(SNAKEMAKE) results/iter3/alpaca_eval.json results/summary.md
	@cat results/summary.md

demo-all: .venv/installed
	@$(SNAKEMAKE) everything
	@$(SNAKEMAKE) $(OF_WHAT_IS_THERE)
	@$(SNAKEMAKE) --report results/report.html -- everything $(OF_WHAT_IS_THERE)
	@cat results/summary.md results/k2/summary.md results/iter3/best_of_n.csv results/tables/evaluations.md results/tables/measured.md
	@echo "Open results/report.html in a browser"

compare compare-all: .venv/installed
	@$(SNAKEMAKE) --keep-going $(subst -,_,$@)
	@$(SNAKEMAKE) results/tables/methods.html
	@cat results/tables/methods.md

install: .venv/installed

.venv/installed: requirements.txt requirements-no-deps.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; name a newer one: PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing the pinned environment into .venv (about two minutes)"
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
	@$(PYTEST_PARALLEL) tests/workflow tests/unit tests/benchmarks

test-unit: .venv/installed
	@$(PYTEST_PARALLEL) tests/unit

test-slow: .venv/installed
	@.venv/bin/python -m pytest -q -m slow

test-conda: .venv/installed
	@$(if $(TORCH_INDEX),PIP_EXTRA_INDEX_URL=$(TORCH_INDEX)) .venv/bin/python -m pytest -q -m slow tests/conda

test-slurm: .venv/installed
	@.venv/bin/python -m pytest -q -rs -m slow tests/slurm

test-pairrm: .venv/installed
	@.venv/bin/python -m pytest -q -m slow tests/parity/test_pairrm_parity.py

estimate: .venv/installed
	@.venv/bin/python src/tools/estimate_cost.py --config $(CONFIG) $(FLAGS)

test-vllm: .venv/installed .cache/vllm/installed
	@$(SNAKEMAKE) results/models/SmolLM2-135M-Instruct
	@.cache/vllm/bin/python -m pytest -q -rs -m slow tests/vllm

.cache/vllm/installed: VLLM_PIP = .cache/vllm/bin/python -m pip install --quiet --disable-pip-version-check
.cache/vllm/installed: tests/vllm/requirements.txt
	@echo "Installing vLLM's CPU build into .cache/vllm (3.7 GB)"
	@$(PYTHON) -m venv .cache/vllm
	@$(VLLM_PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(VLLM_PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r tests/vllm/requirements.txt
	@.cache/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

stale: .venv/installed
	@.venv/bin/python src/tools/list_stale.py results

verify: .venv/installed
	@.venv/bin/python src/tools/verify_results.py $(if $(FIX),--fix) $(or $(RESULTS),results)
