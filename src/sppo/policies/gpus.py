"""Which GPUs and how many cores a program runs on.

On a machine with several GPUs, jobs that run side by side take different ones.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

from sppo.core.errors import UserError

_taken: list[
    IO[str]
] = []  # open as long as the process lives; the system lets go of the locks when it ends


def take_gpus(count: int) -> None:
    """Leave `count` GPUs in CUDA_VISIBLE_DEVICES that no other program of ours on this machine has taken.

    Chosen among those that CUDA_VISIBLE_DEVICES names, as a cluster sets it, else among all. Each is taken by a lock
    on a file in the folder of temporary files. With no more than `count` there is nothing to choose.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    here = (
        named.split(",")
        if named is not None
        else [
            str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))) or count)
        ]
    )
    chosen = here
    if len(here) > count:
        chosen = [name for name in here if len(_taken) < count and _lock(name)]
        if len(chosen) < count:
            raise UserError(
                f"of the {len(here)} GPUs here {len(here) - len(chosen)} are taken by other jobs, and this one needs {count}; "
                f"run Snakemake with --resources gpu={len(here)}, once at a time"
            )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)


def cores_of_job() -> int:
    """Cores that the job was given: by Slurm, else by Snakemake in OMP_NUM_THREADS, else all."""
    given = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("OMP_NUM_THREADS")
    return int(given) if given else os.cpu_count() or 1


def _lock(name: str) -> bool:
    """Take the GPU's lock; False if another process has it."""
    file = (
        Path(tempfile.gettempdir()) / f"sppo-gpu-{os.getuid()}-{name.replace('/', '-')}.lock"
    ).open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    _taken.append(file)
    return True
