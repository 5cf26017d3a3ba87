"""GPUs: jobs side by side take different ones; what a cluster gave is kept to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TAKE = ("import os, sys\nfrom sppo.errors import run\nfrom sppo.gpus import take_gpus\n"
        "run(lambda: (take_gpus(int(sys.argv[1])), print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True), sys.stdin.read()))")

# A training of as many processes; in their place, accelerate's launcher says what they would see.
LAUNCH = """
import os, sys
from accelerate.commands import launch
from sppo import processes
from sppo.errors import run

def children(arguments):
    print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    sys.stdin.read()

processes._check_machine, launch.launch_command = lambda *_: None, children
train = {"processes": int(sys.argv[1]), "machines": 1, "parallel": "ddp"}
sys.argv = ["train_policy.py"]
run(lambda: processes.launch(train, "auto"))
"""


@pytest.fixture
def job(tmp_path):
    """Starts processes that take GPUs and keep them until the test is over, or until they are told to end."""
    started = []

    def start(count: int, visible: str | None, code: str = TAKE) -> subprocess.Popen:
        environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
        environment |= {"PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(tmp_path)} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
        started.append(subprocess.Popen([sys.executable, "-c", code, str(count)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True))
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
    assert none_left.returncode == 1 and said.startswith("error: of the 4 GPUs here 4 are taken") and "--resources gpu=4" in said and said.count("\n") == 1
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
    assert none_left.returncode == 1 and "of the 4 GPUs here 3 are taken" in said
    first.communicate()
    assert took(job(2, "0,1,2,3", LAUNCH)) == "0,1"


@pytest.mark.parametrize(("count", "visible", "taken"), [
    (1, "3", "3"), (2, "GPU-a,GPU-b", "GPU-a,GPU-b"), (1, "MIG-a/7/0,MIG-b", "MIG-a/7/0"), (2, "5", "5"), (1, "", "")])
def test_what_a_cluster_gave_is_kept_to(count, visible, taken, job):
    """With fewer than asked for, the engine says so: it knows what the model needs them for."""
    assert took(job(count, visible)) == taken
    if len(visible.split(",")) <= count:
        assert took(job(count, visible)) == taken  # nothing to choose, nothing locked


def test_a_machine_without_gpus_locks_nothing(job):
    if list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there are GPUs here")
    assert took(job(1, None)) == took(job(1, None)) == "0"
