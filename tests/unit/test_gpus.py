"""GPUs: jobs side by side take different ones; what a cluster gave is kept to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sppo.core.errors import UserError
from sppo.policies.gpus import cores_of_job
from sppo.policies.models import compute_dtype

ROOT = Path(__file__).resolve().parents[2]
TAKE = (
    "import os, sys\nfrom sppo.core.errors import run\nfrom sppo.policies.gpus import take_gpus\n"
    "run(lambda: (take_gpus(int(sys.argv[1])), print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True), sys.stdin.read()))"
)

# A training of as many processes; in their place, accelerate's launcher says what they would see.
LAUNCH = """
import os, sys
from accelerate.commands import launch
from sppo.training import distributed
from sppo.core.errors import run

def children(arguments):
    print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    sys.stdin.read()

distributed._check_machine, launch.launch_command = lambda *_: None, children
train = {"processes": int(sys.argv[1]), "machines": 1, "parallel": "ddp"}
sys.argv = ["train_policy.py"]
run(lambda: distributed.launch(train, "auto"))
"""


@pytest.fixture
def job(tmp_path):
    """Starts processes that take GPUs and keep them until the test is over, or until they are told to end."""
    started = []

    def start(count: int, visible: str | None, code: str = TAKE) -> subprocess.Popen:
        environment = {
            key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"
        }
        environment |= {"PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(tmp_path)} | (
            {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        )
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code, str(count)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.communicate()


def took(process: subprocess.Popen) -> str:
    return process.stdout.readline().strip()


def test_jobs_side_by_side_take_different_gpus_and_give_them_back(job):
    first, second = job(1, "0,1,2,3"), job(1, "0,1,2,3")
    assert {took(first), took(second)} == {"0", "1"}
    assert took(job(2, "0,1,2,3")) == "2,3"
    none_left = job(2, "0,1,2,3")
    _, said = none_left.communicate()
    assert (
        none_left.returncode == 1
        and said.startswith("error: 4 of the 4 GPUs here are used")
        and "--resources gpu=4" in said
        and said.count("\n") == 1
    )
    first.kill()
    first.wait()
    second.communicate()
    assert took(job(2, "0,1,2,3")) == "0,1"


def test_a_training_in_fewer_processes_than_gpus_takes_its_own(job):
    """The launcher holds the locks while its processes run, and they see no other GPU."""
    first = job(2, "0,1,2,3", LAUNCH)
    assert took(first) == "0,1"
    assert took(job(1, "0,1,2,3")) == "2"
    none_left = job(2, "0,1,2,3", LAUNCH)
    _, said = none_left.communicate()
    assert none_left.returncode == 1 and "3 of the 4 GPUs here are used" in said
    first.communicate()
    assert took(job(2, "0,1,2,3", LAUNCH)) == "0,1"


def test_a_job_without_a_gpu_takes_none_and_waits_for_none(job):
    """Where policies are extrapolated, on the CPU, beside jobs that have every GPU."""
    assert took(job(1, "0,1")) == "0" and took(job(1, "0,1")) == "1"
    assert took(job(0, "0,1")) == ""


@pytest.mark.parametrize(
    ("count", "visible", "taken"),
    [
        (1, "3", "3"),
        (2, "GPU-a,GPU-b", "GPU-a,GPU-b"),
        (1, "MIG-a/7/0,MIG-b", "MIG-a/7/0"),
        (2, "5", "5"),
        (1, "", ""),
    ],
)
def test_what_a_cluster_gave_is_kept_to(count, visible, taken, job):
    """With fewer than asked for, the engine says so: it knows what the model needs them for."""
    assert took(job(count, visible)) == taken
    if len(visible.split(",")) <= count:
        assert took(job(count, visible)) == taken  # nothing to choose, nothing locked


def test_a_machine_without_gpus_locks_nothing(job):
    if list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there are GPUs here")
    assert took(job(1, None)) == took(job(1, None)) == "0"


@pytest.mark.parametrize(
    ("slurm", "snakemake", "cores"), [("4", "1", 4), (None, "3", 3), (None, None, os.cpu_count())]
)
def test_a_job_computes_with_the_cores_that_it_was_given(slurm, snakemake, cores, monkeypatch):
    for name, value in (("SLURM_CPUS_PER_TASK", slurm), ("OMP_NUM_THREADS", snakemake)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    assert cores_of_job() == cores


def started(environment: dict[str, str], gpus: int = 1) -> list[str]:
    """Threads and allocator settings of a program that started PyTorch."""
    code = (
        f"import os; from sppo.policies.models import start_torch; start_torch({gpus}); import torch\n"
        "print(torch.get_num_threads(), os.environ.get('PYTORCH_ALLOC_CONF'))"
    )
    left = {
        key: value
        for key, value in os.environ.items()
        if key
        not in (
            "LOCAL_RANK",
            "SLURM_CPUS_PER_TASK",
            "PYTORCH_ALLOC_CONF",
            "PYTORCH_CUDA_ALLOC_CONF",
        )
    }
    more = {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=left | more, check=True, capture_output=True, text=True
    ).stdout.split()


def test_pytorch_starts_with_the_job_s_cores_and_memory_that_fits_other_lengths():
    alone = started({"OMP_NUM_THREADS": "1", "SLURM_CPUS_PER_TASK": "2"})
    assert alone == ["2", "expandable_segments:True"]
    launched = started({"OMP_NUM_THREADS": "1", "SLURM_CPUS_PER_TASK": "2", "LOCAL_RANK": "0"})
    assert launched[0] == "1", "the launcher divided them"
    own = {"OMP_NUM_THREADS": "1", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    assert started(own) == ["1", "None"]


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_bfloat16_that_a_gpu_emulates_is_not_taken(native, dtype, monkeypatch):
    """As on a T4 or V100, where PyTorch says that it is supported unless it is asked otherwise."""
    import torch

    monkeypatch.delenv("SPPO_AUTO_PRECISION", raising=False)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: native or including_emulation,
    )
    assert compute_dtype("auto", "cuda") == getattr(torch, dtype)
    assert compute_dtype("bfloat16", "cuda") == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_environment_says_what_auto_is(dtype, device, monkeypatch):
    import torch

    monkeypatch.setenv("SPPO_AUTO_PRECISION", dtype)
    assert compute_dtype("auto", device) == getattr(torch, dtype)
    assert compute_dtype("float32", device) == torch.float32
    monkeypatch.setenv("SPPO_AUTO_PRECISION", "float16")
    with pytest.raises(
        UserError, match="SPPO_AUTO_PRECISION is 'float16'; set bfloat16 or float32"
    ):
        compute_dtype("auto", device)
