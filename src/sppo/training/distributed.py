"""Training of one policy in several processes: start them, join them, and report an error once.

`accelerate launch` starts the processes with config/accelerate/<train.parallel>.yaml. The main
process, of rank 0, writes all files.
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
FSDP = ("fsdp2", "hsdp")  # the values of train.parallel that are PyTorch's FSDP2


def launch(train: dict[str, Any], device: str) -> None:
    """Run this program with the same arguments in all processes of this machine, and wait for them.

    With several nodes, each node calls this function. It reserves the GPUs, because this
    process holds the locks on them as long as the processes run. If one or more processes fail, the
    first failure is raised as a UserError.

    Args:
        train: the options of the training: processes, nodes, parallel.
        device: auto, cpu, gpu or mps.
    """
    processes, nodes, parallel = train["processes"], train["nodes"], train["parallel"]
    here = processes // nodes
    if device != "cpu":
        take_gpus(here)
    _check_machine(here, parallel, device)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    flags = [
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
        flags += _rendezvous_flags(nodes)
    else:
        flags += ["--main_process_port", 0]  # 0: any free port
    if parallel == "hsdp":
        # The launcher asks for the first two before it reads the configuration file.
        flags += [
            "--use_fsdp",
            "--fsdp_version=2",
            "--use_parallelism_config",
            "--parallelism_config_dp_replicate_size",
            nodes,
            "--parallelism_config_dp_shard_size",
            here,
        ]
    # Silence torch's own report of a failure; the lines below report it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args([*map(str, flags), *sys.argv]))
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ConnectionError:
        raise UserError(
            "another program uses the port at which the nodes meet; set MASTER_PORT to a free "
            "port, the same on each node"
        ) from None
    except ChildFailedError as error:
        raise _first_failure(error.failures) from None


def _first_failure(failures: dict[int, Any]) -> UserError:
    """The error line of the process that failed first and so ended the others.

    `failures` maps ranks to torch's `ProcessFailure`. A process with a UserError comes first, then
    one that was killed. SIGTERM comes last, because accelerate sends it to the remaining processes.
    """

    def order(item: tuple[int, Any]) -> tuple[bool, bool, int]:
        _, failure = item
        has_user_error = isinstance(failure.message, dict)
        return not has_user_error, failure.exitcode == -signal.SIGTERM, failure.exitcode

    rank, first = min(failures.items(), key=order)
    if isinstance(
        first.message, dict
    ):  # torch declares a string, but stores what `errors_once` set
        return UserError(first.message["message"].removeprefix("UserError: "))
    if first.exitcode < 0:
        return UserError(
            f"process {rank} of the training was ended by {signal.Signals(-first.exitcode).name}, "
            "most often because memory ran out; lower train.micro_batch_size and run again: "
            "training resumes from its last checkpoint"
        )
    return UserError(
        f"process {rank} of the training failed with status {first.exitcode}; see its output above"
    )


def _check_machine(here: int, parallel: str, device: str) -> None:
    """Raise a UserError if this machine cannot run `here` processes."""
    import torch

    from sppo.policies.devices import pick_device

    if pick_device(device) == "cpu":
        if parallel != "ddp":
            raise UserError(
                f"train.parallel {parallel} needs GPUs, but PyTorch finds none here; "
                "set train.parallel: ddp"
            )
    elif here > (found := torch.cuda.device_count()):
        raise UserError(
            f"train.processes needs {here} GPUs of this machine, but PyTorch finds {found}; "
            "lower it, or request more GPUs from the cluster"
        )
    if parallel == "zero3" and not importlib.util.find_spec("deepspeed"):
        raise UserError(
            "train.parallel zero3 needs DeepSpeed, which is not installed; "
            "run pip install deepspeed, or set train.parallel: fsdp2"
        )


def _rendezvous_flags(nodes: int) -> list[Any]:
    """Flags with the number of this node and the address and port at which the nodes meet.

    NODE_RANK, MASTER_ADDR and MASTER_PORT have precedence over the values from Slurm.
    """
    rank = os.environ.get("NODE_RANK") or os.environ.get("SLURM_NODEID")
    address = os.environ.get("MASTER_ADDR") or os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if rank is None or address is None:
        raise UserError(
            f"train.nodes is {nodes}, but the number of this node is not known; start the "
            "training with Slurm's srun, or set NODE_RANK (0, 1, ...) and MASTER_ADDR (the address "
            "of node 0) on each node"
        )
    # The port depends on the job, because two jobs may share a machine.
    port_of_job = 20000 + int(os.environ.get("SLURM_JOB_ID", 9500)) % 10000
    port = os.environ.get("MASTER_PORT") or port_of_job
    return ["--machine_rank", rank, "--main_process_ip", address, "--main_process_port", port]


def is_launched() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def is_main_process() -> bool:
    """Whether this process writes the files: it is the only one, or has rank 0."""
    return int(os.environ.get("RANK", 0)) == 0


def join_processes(processes: int, device: str) -> None:
    """Join the other processes in torch.distributed; then `cuda` is this process's own GPU.

    Does nothing if this is the only process. A UserError if the number of processes is not
    `processes`.
    """
    found = int(os.environ.get("WORLD_SIZE", 1))
    if found != processes:
        raise UserError(
            f"{found} processes were started, but train.processes is {processes}; "
            "let src/train_policy.py start them"
        )
    if processes > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu", timeout=timedelta(minutes=30))


@contextmanager
def barrier_at_end() -> Iterator[bool]:
    """Yield whether this is the main process. All processes wait for each other at the end.

    Thus `if` in the block lets the main process work while the others wait.
    """
    yield is_main_process()
    if is_launched():
        import torch.distributed

        torch.distributed.barrier()


@contextmanager
def errors_once() -> Iterator[None]:
    """Pass a UserError of a launched process to the launcher, which prints only the first one.

    Errors in the other processes that follow from it, in their communication, become one line each.
    """
    try:
        yield
    except UserError as error:
        if "TORCHELASTIC_ERROR_FILE" not in os.environ:  # No launcher started this process.
            raise
        from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

        ErrorHandler().record_exception(error)
        sys.exit(1)
    except RuntimeError as error:
        from torch.distributed import DistError

        lost_connection = isinstance(error, DistError) or "by peer" in str(error)
        if not (is_launched() and lost_connection):
            raise
        print(
            f"process {os.environ['RANK']} lost the connection to another process: "
            f"{' '.join(str(error).split())}",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
