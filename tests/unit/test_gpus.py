"""GPUs: parallel jobs take different ones, and the GPUs that a cluster assigned are used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sppo.core.errors import UserError
from sppo.policies import gpus
from sppo.policies.devices import compute_dtype
from sppo.policies.gpus import cores_of_job, count_gpus

ROOT = Path(__file__).resolve().parents[2]
# Takes GPUs, prints them and holds them until its standard input is closed.
TAKE = """
import os, sys
from sppo.core.errors import run
from sppo.policies.gpus import take_gpus

def hold():
    take_gpus(int(sys.argv[1]))
    print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    sys.stdin.read()

run(hold)
"""

# Training in several processes. Instead of them, a replaced launcher prints what they would see.
LAUNCH = """
import os, sys
from accelerate.commands import launch
from sppo.training import distributed
from sppo.core.errors import run

def children(arguments):
    print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    sys.stdin.read()

distributed._check_machine, launch.launch_command = lambda *_: None, children
train = {"processes": int(sys.argv[1]), "nodes": 1, "parallel": "ddp"}
sys.argv = ["train_policy.py"]
run(lambda: distributed.launch(train, "auto"))
"""


@pytest.fixture
def job(tmp_path):
    """Starts processes that hold GPUs until their input is closed or the test ends."""
    processes = []

    def start(count: int, visible: str | None, code: str = TAKE) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(tmp_path)}
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        if visible is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(count)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.communicate()


def gpus_taken_by(process: subprocess.Popen) -> str:
    return process.stdout.readline().strip()


FAKE_CTYPES = """
class c_int:
    value = 0

def byref(count):
    return count

class CDLL:
    def __init__(self, name):
        assert name == "libcuda.so.1"

    def cuInit(self, flags):
        return {status}

    def cuDeviceGetCount(self, count):
        count.value = 7
        return 0
"""


@pytest.mark.parametrize(("status", "found"), [(0, 7), (100, 0)])
def test_nvidia_s_driver_is_asked_for_its_gpus(status, found, tmp_path, monkeypatch):
    """100 is the driver's "no device", as with an empty CUDA_VISIBLE_DEVICES."""
    (tmp_path / "ctypes.py").write_text(FAKE_CTYPES.format(status=status))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpus.ctypes, "CDLL", lambda name: None)
    assert count_gpus() == found


def test_amd_s_gpus_are_counted(tmp_path, monkeypatch):
    for node, units in enumerate((0, 304, 304)):  # node 0 is a processor
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "properties").write_text(f"cpu_cores_count 8\nsimd_count {units}\n")
    monkeypatch.setattr(gpus, "AMD_NODES", tmp_path)
    monkeypatch.setattr(gpus, "NVIDIA_DRIVER", "libnone.so.1")
    for key in gpus.AMD_VISIBLE:
        monkeypatch.delenv(key, raising=False)
    assert count_gpus() == 2
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
    assert count_gpus() == 1
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    assert count_gpus() == 0


def test_no_driver_means_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "AMD_NODES", tmp_path)
    monkeypatch.setattr(gpus, "NVIDIA_DRIVER", "libnone.so.1")
    assert count_gpus() == 0


def test_parallel_jobs_take_different_gpus_and_release_them(job):
    first, second = job(1, "0,1,2,3"), job(1, "0,1,2,3")
    assert {gpus_taken_by(first), gpus_taken_by(second)} == {"0", "1"}
    assert gpus_taken_by(job(2, "0,1,2,3")) == "2,3"
    none_left = job(2, "0,1,2,3")
    _, said = none_left.communicate()
    assert none_left.returncode == 1
    assert said.startswith("error: 4 of the 4 GPUs here are used")
    assert "--resources gpu=4" in said
    assert said.count("\n") == 1
    first.kill()
    first.wait()
    second.communicate()
    assert gpus_taken_by(job(2, "0,1,2,3")) == "0,1"


def test_a_training_takes_only_as_many_gpus_as_it_needs(job):
    """The launcher holds the locks while its processes run, and they see no other GPU."""
    first = job(2, "0,1,2,3", LAUNCH)
    assert gpus_taken_by(first) == "0,1"
    assert gpus_taken_by(job(1, "0,1,2,3")) == "2"
    none_left = job(2, "0,1,2,3", LAUNCH)
    _, said = none_left.communicate()
    assert none_left.returncode == 1
    assert "3 of the 4 GPUs here are used" in said
    first.communicate()
    assert gpus_taken_by(job(2, "0,1,2,3", LAUNCH)) == "0,1"


def test_a_job_without_a_gpu_takes_none_and_does_not_wait(job):
    """For example a policy is extrapolated on the CPU while other jobs use every GPU."""
    assert gpus_taken_by(job(1, "0,1")) == "0"
    assert gpus_taken_by(job(1, "0,1")) == "1"
    assert gpus_taken_by(job(0, "0,1")) == ""


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
def test_gpus_assigned_by_a_cluster_are_used(count, visible, taken, job):
    """A job with fewer GPUs than it needs gets its error from the engine, which knows the model.

    If there is no choice, no GPU is locked, so a second job gets the same GPUs.
    """
    assert gpus_taken_by(job(count, visible)) == taken
    if len(visible.split(",")) <= count:
        assert gpus_taken_by(job(count, visible)) == taken


def test_a_machine_without_gpus_locks_nothing(job):
    if list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there are GPUs here")
    assert gpus_taken_by(job(1, None)) == gpus_taken_by(job(1, None)) == "0"


@pytest.mark.parametrize(
    ("slurm", "snakemake", "cores"), [("4", "1", 4), (None, "3", 3), (None, None, os.cpu_count())]
)
def test_a_job_uses_the_cores_that_it_was_given(slurm, snakemake, cores, monkeypatch):
    for name, value in (("SLURM_CPUS_PER_TASK", slurm), ("OMP_NUM_THREADS", snakemake)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    assert cores_of_job() == cores


def torch_settings(environment: dict[str, str], gpus: int = 1) -> list[str]:
    """Number of threads and allocator setting of a program that starts PyTorch."""
    code = (
        "import os; from sppo.policies.devices import start_torch\n"
        f"start_torch({gpus}); import torch\n"
        "print(torch.get_num_threads(), os.environ.get('PYTORCH_ALLOC_CONF'))"
    )
    variables = dict(os.environ)
    for name in (
        "LOCAL_RANK",
        "SLURM_CPUS_PER_TASK",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
    ):
        variables.pop(name, None)
    variables |= {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, check=True, capture_output=True, text=True
    ).stdout.split()


def test_pytorch_starts_with_the_job_s_cores_and_growing_memory():
    """Expandable segments let PyTorch use the memory of one batch length for another."""
    found = torch_settings({"OMP_NUM_THREADS": "1", "SLURM_CPUS_PER_TASK": "2"})
    assert found == ["2", "expandable_segments:True"]


def test_a_launched_process_keeps_its_number_of_threads():
    """The launcher has divided the cores of the job among its processes."""
    job = {"OMP_NUM_THREADS": "1", "SLURM_CPUS_PER_TASK": "2", "LOCAL_RANK": "0"}
    assert torch_settings(job)[0] == "1"


def test_the_user_s_allocator_setting_is_kept():
    own = {"OMP_NUM_THREADS": "1", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    assert torch_settings(own) == ["1", "None"]


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_precision_does_not_use_emulated_bfloat16(native, dtype, monkeypatch):
    """On a T4 or V100, PyTorch by default reports emulated bfloat16 as supported."""
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
def test_an_environment_variable_sets_the_auto_precision(dtype, device, monkeypatch):
    import torch

    monkeypatch.setenv("SPPO_AUTO_PRECISION", dtype)
    assert compute_dtype("auto", device) == getattr(torch, dtype)
    assert compute_dtype("float32", device) == torch.float32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_unknown_auto_precision_is_refused(device, monkeypatch):
    monkeypatch.setenv("SPPO_AUTO_PRECISION", "float16")
    with pytest.raises(
        UserError, match="SPPO_AUTO_PRECISION is 'float16'; set bfloat16 or float32"
    ):
        compute_dtype("auto", device)
