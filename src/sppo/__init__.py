"""What the programs in src/ share: losses, preference estimates, artifacts, configuration."""

import os

# Idle OpenMP threads must sleep: spinning, two programs on one machine slow each other by 5 to 15 times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
