"""The device, number format and threads of a job, and the set-up of PyTorch."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sppo.core.errors import UserError
from sppo.policies.gpus import cores_of_job, count_gpus, take_gpus

if TYPE_CHECKING:
    import torch


def pick_device(device: str) -> str:
    """`cpu`, `cuda` or `mps` for the setting auto, cpu, gpu or mps.

    UserError if PyTorch sees no GPU although the setting is gpu, or although the setting is auto
    and Slurm allocated a GPU. UserError also if the setting is mps without Apple silicon. Warns if
    the setting is auto and only PyTorch sees no GPU.
    """
    import torch

    if device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device is mps, which needs Apple silicon; set device: cpu or gpu")
        return "mps"
    given = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS")
    if device == "auto" and given and not torch.cuda.is_available():
        raise UserError(
            f"Slurm gave this job a GPU (number {given}), but PyTorch sees none; install a CUDA "
            "build of torch, or set device: cpu"
        )
    if device == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "device is gpu, but PyTorch sees no GPU here; set device: cpu, or install a CUDA build "
            "of torch"
        )
    if device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if gpus := count_gpus():
        print(
            f"warning: this machine has {gpus} GPUs, but PyTorch sees none, so this runs on the "
            "CPU; install a newer driver (for CUDA 13, NVIDIA's 580 or newer) or a build of torch "
            "for this GPU, or set device: cpu",
            file=sys.stderr,
        )
    return "cpu"


def compute_dtype(precision: str, device: str) -> torch.dtype:
    """The dtype of the computation for `precision` (auto, bfloat16, float32) on this device.

    auto is bfloat16 if the hardware supports it, otherwise float32, because emulated bfloat16 is
    slower. The environment variable SPPO_AUTO_PRECISION overrides the meaning of auto, so that one
    machine can repeat the computation of another. UserError if its value is unknown.
    """
    import torch

    if precision == "auto":
        precision = os.environ.get("SPPO_AUTO_PRECISION", "auto")
    if precision == "auto":
        if device == "cuda":
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            supported = device == "cpu" and _cpu_has_bfloat16()
        precision = "bfloat16" if supported else "float32"
    if precision not in ("bfloat16", "float32"):
        raise UserError(
            f"SPPO_AUTO_PRECISION is {precision!r}; set bfloat16 or float32, or unset it"
        )
    return getattr(torch, precision)


def weights_dtype(lora_rank: int, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the weights in training and scoring.

    It is float32, because updates are too small for bfloat16. LoRA does not update these weights,
    so with LoRA it is `dtype`, that of the computation.
    """
    import torch

    return dtype if lora_rank else torch.float32


def _cpu_has_bfloat16() -> bool:
    try:
        cpu_flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags)


def start_torch(gpus: int = 1) -> None:
    """Set up PyTorch for this job: its GPUs, its number of threads, and quiet logs.

    gpus: how many GPUs to reserve. A launcher of several processes (LOCAL_RANK is set) has already
    assigned the GPUs and divided the cores of the job.
    """
    # With expandable segments, freed memory can hold tensors of other sizes. This matters because
    # batches differ in length. PyTorch reads the variable when it first uses a GPU. vLLM's
    # communication between several GPUs does not support such memory.
    if gpus == 1 and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    launched = "LOCAL_RANK" in os.environ
    if not launched:
        take_gpus(gpus)  # otherwise the Trainer would use all GPUs that it sees
    import torch
    from transformers.utils import logging

    if launched:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    else:
        torch.set_num_threads(cores_of_job())
    if not torch.cuda.is_available():
        keep_freed_memory()
    logging.disable_progress_bar()


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensors, where it can (glibc).

    Otherwise it returns large blocks to the system, and each new tensor of some megabytes costs
    page faults, 5 to 15% of the time of a job on a CPU.
    """
    mmap_max, trim_threshold, arena_max = -4, -1, -8  # the numbers of malloc.h
    try:
        library = ctypes.CDLL(None)
        library.mallopt(mmap_max, 0)  # all memory is from the heap, not from mappings
        library.mallopt(trim_threshold, 2**31 - 1)  # which is not shrunk
        library.mallopt(arena_max, 1)  # threads have it in common; their own heaps hold 64 MB each
    except (OSError, AttributeError, TypeError):
        return  # another C library


def avoid_cudnn_attention() -> None:
    """Let PyTorch use other attention kernels than cuDNN's, for batches with a mask.

    With a mask, cuDNN's gradients can be NaN at some lengths, such as 704. It is the default on an
    H100 since torch 2.11 (github.com/pytorch/pytorch/issues/196678). The mask can be that of
    padding on the left, or of a sliding window.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
