"""Which GPUs a program uses, and how many cores.

On a machine with several GPUs, jobs that run at the same time use different GPUs.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from sppo.core.errors import UserError

# Lock files of the GPUs of this process. They stay open until it ends; then the operating system
# releases the locks.
_lock_files: list[IO[str]] = []


NVIDIA_DRIVER = "libcuda.so.1"
# Prints how many GPUs NVIDIA's driver shows to a program, which is what PyTorch finds.
ASK_DRIVER = f"""
import ctypes
driver, count = ctypes.CDLL({NVIDIA_DRIVER!r}), ctypes.c_int()
failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
print(0 if failed else count.value)
"""
AMD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")  # processors and GPUs, by AMD's driver
AMD_VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def count_gpus() -> int:
    """How many GPUs PyTorch would see in a program that is started here.

    Told without PyTorch, because the Snakefile asks and importing it takes seconds. The driver is
    asked instead of counting files in /dev: it knows the parts of a divided GPU (MIG), containers
    without these files, and the variables that hide GPUs.
    """
    return _nvidia_gpus() or _amd_gpus()


def _nvidia_gpus() -> int:
    try:
        ctypes.CDLL(NVIDIA_DRIVER)
    except OSError:
        return 0
    # In another process, because a process that has started the driver must not fork.
    asked = subprocess.run([sys.executable, "-c", ASK_DRIVER], capture_output=True, text=True)
    return int(asked.stdout) if asked.returncode == 0 else 0


def _amd_gpus() -> int:
    """A node of AMD's driver is a GPU if it has units that compute in SIMD."""
    nodes = [file.read_text().split() for file in AMD_NODES.glob("*/properties")]
    here = sum(int(node[node.index("simd_count") + 1]) > 0 for node in nodes)
    shown = [len(_names(os.environ[key])) for key in AMD_VISIBLE if key in os.environ]
    return min([here, *shown])


def _names(visible: str) -> list[str]:
    """The names of the GPUs in a variable such as CUDA_VISIBLE_DEVICES."""
    return [name.strip() for name in visible.split(",") if name.strip()]


def take_gpus(count: int) -> None:
    """Set CUDA_VISIBLE_DEVICES to `count` GPUs that no other program of ours uses on this machine.

    The choice is among the GPUs in CUDA_VISIBLE_DEVICES, which a cluster sets, or among all GPUs if
    it is not set. If these are not more than `count`, all of them are used without locks. A GPU is
    reserved by a lock on a file in the folder for temporary files. UserError if fewer than `count`
    are free.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        available = _names(visible)
    else:
        available = [str(number) for number in range(count_gpus() or count)]
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
