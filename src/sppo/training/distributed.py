"""Several processes that train one policy: starting them, joining them, reporting an error once.

`accelerate launch` starts them after config/accelerate/<train.parallel>.yaml. The first one writes everything.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from sppo.core.artifacts import ROOT
from sppo.core.errors import UserError
from sppo.policies.gpus import cores_of_job, take_gpus

CONFIGS = ROOT / "config" / "accelerate"


def launch(train: dict[str, Any], device: str) -> None:
    """Run this program with the same arguments in all processes of this machine, and wait for them.

    `train` holds processes, nodes and parallel; of several nodes each calls this. What a process ends with is one UserError.
    The GPUs are taken here, where the locks are held as long as the processes run.
    """
    processes, nodes, parallel = train["processes"], train["nodes"], train["parallel"]
    here = processes // nodes
    if device != "cpu":
        take_gpus(here)
    _check_machine(here, parallel, device)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = [
        "--config_file",
        CONFIGS / f"{parallel}.yaml",
        "--num_processes",
        processes,
        "--num_machines",
        nodes,
        "--num_cpu_threads_per_process",
        max(1, cores_of_job() // here),
    ]
    if nodes > 1:
        words += _rendezvous_flags(nodes)
    else:
        words += ["--main_process_port", 0]  # any that is free
    if parallel == "fsdp2":
        words += ["--fsdp_activation_checkpointing", str(train["gradient_checkpointing"]).lower()]
    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # what it has to say is said below
    try:
        launch_command(launch_command_parser().parse_args([*map(str, words), *sys.argv]))
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ConnectionError:
        raise UserError(
            "another program uses the port where the nodes were to meet; set MASTER_PORT to one that is free, the same on each"
        ) from None
    except ChildFailedError as failed:
        # What the others end with follows from a UserError or a kill; SIGTERM is how accelerate ends them.
        rank, first = min(
            failed.failures.items(),
            key=lambda item: (
                not isinstance(item[1].message, dict),
                item[1].exitcode == -signal.SIGTERM,
                item[1].exitcode,
            ),
        )
        message: Any = first.message  # torch declares text, and reads a dict where it can
        if isinstance(message, dict):
            raise UserError(message["message"].removeprefix("UserError: ")) from None
        if first.exitcode < 0:
            raise UserError(
                f"process {rank} of the training was ended by {signal.Signals(-first.exitcode).name}, most often for want of memory; "
                "lower train.micro_batch_size, and run again: it goes on from its last checkpoint"
            ) from None
        raise UserError(
            f"process {rank} of the training failed with status {first.exitcode}; what it said stands above"
        ) from None


def _check_machine(here: int, parallel: str, device: str) -> None:
    """This machine can run `here` processes, else UserError."""
    import torch

    from sppo.policies.models import pick_device

    if pick_device(device) == "cpu":
        if parallel != "ddp":
            raise UserError(
                f"train.parallel {parallel} needs GPUs, and PyTorch sees none here; set train.parallel: ddp"
            )
    elif here > (found := torch.cuda.device_count()):
        raise UserError(
            f"train.processes wants {here} GPUs of this machine, and PyTorch sees {found}; lower it, or ask the cluster for more"
        )
    if parallel == "zero3" and not importlib.util.find_spec("deepspeed"):
        raise UserError(
            "train.parallel zero3 needs DeepSpeed, which is not installed; run pip install deepspeed, or set train.parallel: fsdp2"
        )


def _rendezvous_flags(nodes: int) -> list[Any]:
    """Flags that say which of the nodes this is and where they meet: Slurm knows, or the user says."""
    rank = os.environ.get("NODE_RANK") or os.environ.get("SLURM_NODEID")
    address = os.environ.get("MASTER_ADDR") or os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if rank is None or address is None:
        raise UserError(
            f"train.nodes is {nodes}, but nothing says which of them this is; start the training with Slurm's srun, or set "
            "NODE_RANK (0, 1, ...) and MASTER_ADDR (the address of machine 0) on each"
        )
    port = (
        os.environ.get("MASTER_PORT") or 20000 + int(os.environ.get("SLURM_JOB_ID", 9500)) % 10000
    )  # two jobs may share a machine
    return ["--machine_rank", rank, "--main_process_ip", address, "--main_process_port", port]


def is_launched() -> bool:
    """Whether this is one of several processes."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def is_first() -> bool:
    """Whether this process writes: the only one, or the first of several."""
    return int(os.environ.get("RANK", 0)) == 0


def join_processes(processes: int, device: str) -> None:
    """Join the other processes in torch.distributed, with a GPU of its own as `cuda`.

    Does nothing where this is the only process.
    """
    found = int(os.environ.get("WORLD_SIZE", 1))
    if found != processes:
        raise UserError(
            f"{found} processes were started, but train.processes is {processes}; let src/train_policy.py start them"
        )
    if processes > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu", timeout=timedelta(minutes=30))


@contextmanager
def first_alone() -> Iterator[bool]:
    """The first process goes through the block with True while the others wait at its end."""
    yield is_first()
    if is_launched():
        import torch.distributed

        torch.distributed.barrier()


@contextmanager
def errors_once() -> Iterator[None]:
    """Leave a UserError of a launched process to the launcher, which prints the first one once.

    What follows in the other processes is cut to a line.
    """
    try:
        yield
    except UserError as error:
        if "TORCHELASTIC_ERROR_FILE" not in os.environ:
            raise
        from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

        ErrorHandler().record_exception(error)
        sys.exit(1)
    except RuntimeError as error:
        from torch.distributed import DistError

        if not (is_launched() and (isinstance(error, DistError) or "by peer" in str(error))):
            raise
        print(
            f"process {os.environ['RANK']} could not reach another: {' '.join(str(error).split())}",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
