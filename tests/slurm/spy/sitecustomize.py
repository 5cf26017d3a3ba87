"""Record the start of each program of the workflow, with its Slurm job and its GPUs.

The folder of this file is on PYTHONPATH, so that each Python process imports it at its start.
"""

import json
import os
import sys

if len(sys.orig_argv) > 1 and sys.orig_argv[1].startswith("src/"):
    start = {
        "program": sys.orig_argv[1],
        "words": sys.orig_argv[2:],
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    with open(os.environ["SPPO_STARTED"], "a", encoding="utf-8") as stream:
        stream.write(json.dumps(start) + "\n")
