"""Which GPUs a program uses, and how many cores.

On a machine with several GPUs, jobs that run at the same time use different GPUs.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

from sppo.core.errors import UserError

# Lock files of the GPUs of this process. They stay open until it ends; then the operating system
# releases the locks.
_lock_files: list[IO[str]] = []


def take_gpus(count: int) -> None:
    """Set CUDA_VISIBLE_DEVICES to `count` GPUs that no other program of ours uses on this machine.

    The choice is among the GPUs in CUDA_VISIBLE_DEVICES, which a cluster sets, or among all GPUs if
    it is not set. If these are not more than `count`, all of them are used without locks. A GPU is
    reserved by a lock on a file in the folder for temporary files. UserError if fewer than `count`
    are free.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        available = visible.split(",")
    else:
        devices = list(Path("/dev").glob("nvidia[0-9]*"))
        available = [str(number) for number in range(len(devices) or count)]
    chosen = available
    if len(available) > count:
        chosen = [name for name in available if len(_lock_files) < count and _lock(name)]
        if len(chosen) < count:
            raise UserError(
                f"{len(available) - len(chosen)} of the {len(available)} GPUs here are used by "
                f"other jobs, and this job needs {count}; run Snakemake with "
                f"--resources gpu={len(available)}, and only once at a time"
            )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)


def cores_of_job() -> int:
    """The number of cores of this job: from Slurm, else from OMP_NUM_THREADS, else all cores.

    Snakemake sets OMP_NUM_THREADS.
    """
    given = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("OMP_NUM_THREADS")
    return int(given) if given else os.cpu_count() or 1


def _lock(name: str) -> bool:
    """Take the GPU's lock; False if another process has it."""
    file_name = f"sppo-gpu-{os.getuid()}-{name.replace('/', '-')}.lock"
    file = (Path(tempfile.gettempdir()) / file_name).open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    _lock_files.append(file)
    return True
