"""What the programs in src/ share: losses, preference estimates, artifacts, configuration."""

import os

# Idle OpenMP threads must sleep: spinning, two programs on one machine slow each other by 5 to 15 times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No package may report what is run here, or on which hardware. Packages read these when they are imported, and every program
# imports this one first. Who wants to report sets the variables otherwise.
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL at the start of every training; transformers and datasets in their user agent
    "DO_NOT_TRACK": "1",  # the same for huggingface_hub, and vLLM
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray, where vLLM uses it
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets and evaluate count what is loaded
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers asks a service to convert a hub model that lacks safetensors
}
for name, value in QUIET.items():
    os.environ.setdefault(name, value)
