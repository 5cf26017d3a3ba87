"""src/train_policy.py as it is, on processors alone, with what the tests need of it.

SHARDED     accelerate divides a policy over GPUs only; here it is told that these processes hold some, so that FSDP2 runs over gloo
KILL_STEP   process 1 is killed before that step
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import train_policy
from sppo import processes
from sppo.errors import run


def shard_on_cpu() -> None:
    """FSDP2 without GPUs: the backend is gloo and the device the processor, all else is accelerate's own."""
    import torch.distributed
    from accelerate.state import DistributedType, PartialState

    if processes.is_launched():
        torch.distributed.init_process_group("gloo")
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def kill_before(step: int) -> None:
    from sppo.training import Say

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
    Say.on_step_begin = on_step_begin


if __name__ == "__main__":
    if "SHARDED" in os.environ:
        processes._check_machine = lambda *_: None
        if processes.is_launched():
            shard_on_cpu()
    if "KILL_STEP" in os.environ and os.environ.get("RANK") == "1":
        kill_before(int(os.environ["KILL_STEP"]))
    run(train_policy.main)
