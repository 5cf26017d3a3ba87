"""What the programs in src/ share: losses, preference estimates, artifacts, configuration."""

import os

# Idle OpenMP threads must sleep: spinning, two programs on one machine slow each other by 5 to 15
# times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No package may report what is run here, or on which hardware. Packages read these when they are
# imported, and every program imports this one first. A variable that is set already stays as it is.
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL, at each training's start; user agents for the hub
    "DO_NOT_TRACK": "1",  # the same, and vLLM
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray, where vLLM uses it
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets and evaluate count what is loaded
    # transformers has a service convert a hub model that lacks safetensors.
    "DISABLE_SAFETENSORS_CONVERSION": "1",
}
for name, value in QUIET.items():
    os.environ.setdefault(name, value)
