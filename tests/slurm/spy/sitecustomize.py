"""On PYTHONPATH of a run: every program of the workflow notes on which Slurm job it was started and which GPUs it was given."""

import json
import os
import sys

if len(sys.orig_argv) > 1 and sys.orig_argv[1].startswith("src/"):
    with open(os.environ["SPPO_STARTED"], "a", encoding="utf-8") as stream:
        stream.write(
            json.dumps(
                {
                    "program": sys.orig_argv[1],
                    "words": sys.orig_argv[2:],
                    "pid": os.getpid(),
                    "job": os.environ.get("SLURM_JOB_ID"),
                    "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
                }
            )
            + "\n"
        )
