"""src/train_policy.py, with what the tests need of it.

Accelerate divides a policy over GPUs only; here --parallel fsdp2 and zero3 divide it over processors. With KILL_STEP in the
environment, process 1 is killed before that step.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import train_policy
from sppo.core.errors import run
from sppo.training import distributed


def divide_on_cpu() -> None:
    """Let accelerate take the processor for a GPU of each process: the backend is gloo, all else is its own."""
    from accelerate.state import DistributedType, PartialState

    def not_cpu(self, cpu=False, **more):
        began(self, cpu=False, **more)

    began, PartialState.__init__ = PartialState.__init__, not_cpu
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}


def kill_before(step: int) -> None:
    from sppo.training.trainer import StepLog

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    StepLog.on_step_begin = on_step_begin


if __name__ == "__main__":
    if {"fsdp2", "zero3"} & set(sys.argv):
        distributed._check_machine = lambda *_: None
        divide_on_cpu()
    if "KILL_STEP" in os.environ and os.environ.get("RANK") == "1":
        kill_before(int(os.environ["KILL_STEP"]))
    run(train_policy.main)
