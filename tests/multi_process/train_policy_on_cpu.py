"""src/train_policy.py, changed for the tests.

Accelerate divides a policy only over GPUs. Here --parallel fsdp2 and zero3 divide it over processes
on the CPU. If KILL_STEP is set in the environment, process 1 is killed before that step. If PACK is
set, batches are packed, as on a GPU.
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
    """Make accelerate treat the CPU as a GPU of each process, with the backend gloo."""
    from accelerate.state import DistributedType, PartialState

    original_init = PartialState.__init__

    def init_without_cpu(self, cpu=False, **more):
        original_init(self, cpu=False, **more)

    PartialState.__init__ = init_without_cpu
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}


def pack() -> None:
    """Make training pack its sequences."""
    from sppo.training import attention, trainer

    def choose_packed(model, device):
        attention.use(model, attention.PACKED)
        return "packed"

    trainer.choose_layout = choose_packed


def print_mesh() -> None:
    """Print over which processes a weight is divided, when training begins."""
    from sppo.training.trainer import StepLog

    def on_train_begin(self, args, state, control, model, **_):
        mesh = next(model.parameters()).device_mesh
        print("mesh", dict(zip(mesh.mesh_dim_names or ["all"], mesh.shape, strict=True)))

    StepLog.on_train_begin = on_train_begin


def kill_before(step: int) -> None:
    """Make this process kill itself when `step` steps are done."""
    from sppo.training.trainer import StepLog

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    StepLog.on_step_begin = on_step_begin


if __name__ == "__main__":
    if {"fsdp2", "hsdp", "zero3"} & set(sys.argv):
        distributed._check_machine = lambda *_: None
        divide_on_cpu()
    if "hsdp" in sys.argv:
        print_mesh()
    if "PACK" in os.environ:
        pack()
    if "KILL_STEP" in os.environ and os.environ.get("RANK") == "1":
        kill_before(int(os.environ["KILL_STEP"]))
    run(train_policy.main)
