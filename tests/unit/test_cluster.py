"""The check before the first job on a cluster.

Scripts replace the commands of Slurm here; tests/slurm/ runs a real Slurm.
"""

from __future__ import annotations

import os

import pytest

from sppo.core.errors import UserError
from sppo.policies.devices import pick_device
from sppo.workflow.cluster import Asked, check_cluster

FITS = Asked("train_policy", "gpu", "physics", 1440)


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Replace the commands of Slurm by scripts that print the given text."""

    def put(sinfo: str, sacct: str = "", sacctmgr: str = "echo physics; echo Chemistry") -> None:
        for name, script in (
            ("sinfo", f"printf '{sinfo}'"),
            ("sacct", sacct),
            ("sacctmgr", sacctmgr),
        ):
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return put


TWO = "gpu*|1-00:00:00\\nshort|30:00\\nlong|infinite\\n"
DISABLED = "echo Slurm accounting storage is disabled >&2; exit 1"


@pytest.mark.parametrize(
    ("job", "status_command"),
    [
        (FITS, "sacct"),
        (Asked("train_policy", "", "", 1440), "sacct"),
        (Asked("train_policy", "long", "CHEMISTRY", 10**6), "squeue"),
        (Asked("train_policy", "gpu,long", "physics", None), "sacct"),
    ],
)
def test_jobs_that_fit_the_cluster_pass(answers, job, status_command):
    answers(TWO)
    check_cluster([job], status_command)


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (
            Asked("train_policy", "gpus", "physics", 1),
            "slurm_partition is gpus, but this cluster has gpu, long, short; "
            "edit profiles/slurm/config.yaml",
        ),
        (Asked("train_policy", "gpu,gpus", "physics", 1), "slurm_partition is gpus"),
        (Asked("train_policy", "gpu", "biology", 1), "may use chemistry, physics"),
        (
            Asked("train_policy", "short", "physics", 31),
            r"more than the 30 minutes that partition short allows \(train_policy for 31\)",
        ),
    ],
)
def test_a_job_that_does_not_fit_names_what_would_fit(answers, job, said):
    answers(TWO)
    with pytest.raises(UserError, match=said):
        check_cluster([FITS, job], "sacct")


def test_a_gpu_limit_below_the_request_of_one_job_is_refused(answers):
    answers(TWO)
    training = Asked("train_policy", "gpu", "physics", 1, gpus=8)
    check_cluster([training], "sacct", most_gpus=8)
    with pytest.raises(
        UserError,
        match=(
            "train_policy asks for 8 GPUs, but at most 1 may be in use at a time; "
            "give --workflow-profile"
        ),
    ):
        check_cluster([training], "sacct", most_gpus=1)


def test_fewer_gpus_than_the_configuration_uses_is_refused(answers):
    answers(TWO)
    check_cluster([Asked("train_policy", "gpu", "physics", 1, gpus=8, gpus_needed=8)], "sacct")
    with pytest.raises(
        UserError,
        match=(
            "generate_responses needs 2 GPUs .*tensor_parallel.* "
            "profiles/slurm/config.yaml gives it 1; edit gpu there"
        ),
    ):
        check_cluster(
            [Asked("generate_responses", "gpu", "physics", 1, gpus=1, gpus_needed=2)], "sacct"
        )


def test_a_partition_is_required_if_the_cluster_has_no_default(answers):
    answers("gpu|1-00:00:00\\nshort|30:00\\n")
    with pytest.raises(
        UserError,
        match="slurm_partition is not set, and this cluster has no default partition; "
        "in .* set it to one of gpu, short",
    ):
        check_cluster([Asked("train_policy", "", "", 1)], "sacct")


def test_without_accounting_squeue_and_no_account_are_required(answers):
    answers(TWO, sacct=DISABLED)
    check_cluster([Asked("train_policy", "gpu", "", 1)], "squeue")
    with pytest.raises(UserError, match="remove the # before slurm-status-command: squeue"):
        check_cluster([Asked("train_policy", "gpu", "", 1)], "sacct")
    with pytest.raises(
        UserError, match="slurm_account is physics, but this cluster does not keep accounts"
    ):
        check_cluster([FITS], "squeue")


def test_a_slurm_that_does_not_answer_is_refused(answers, tmp_path):
    answers("", sacct="true")
    (tmp_path / "sinfo").write_text(
        "#!/bin/sh\necho slurm_load_partitions: Unable to contact slurm controller >&2\nexit 1\n"
    )
    with pytest.raises(UserError, match=r"Slurm does not answer \(slurm_load_partitions: Unable"):
        check_cluster([FITS], "sacct")


def test_a_machine_without_slurm_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="Slurm is not installed here"):
        check_cluster([FITS], "sacct")


def test_a_gpu_from_slurm_is_used(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_GPUS", "3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") == "cuda"


def test_a_gpu_from_slurm_that_pytorch_does_not_see_is_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_GPUS", "3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pick_device("cpu") == "cpu"
    with pytest.raises(
        UserError, match=r"Slurm gave this job a GPU \(number 3\), but PyTorch sees none"
    ):
        pick_device("auto")


@pytest.mark.parametrize(("device", "gpus"), [("auto", 2), ("auto", 0), ("cpu", 2)])
def test_gpus_that_pytorch_does_not_see_are_a_warning(device, gpus, monkeypatch, capsys):
    for key in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sppo.policies.devices.count_gpus", lambda: gpus)
    assert pick_device(device) == "cpu"
    warned = capsys.readouterr().err
    assert ("warning: this machine has 2 GPUs" in warned) == (device == "auto" and gpus > 0)


@pytest.mark.parametrize(
    ("limit", "minutes"), [("30:00", 30), ("1:00:00", 60), ("2-12:30:00", 3630)]
)
def test_time_limits_are_read_in_slurm_s_formats(answers, limit, minutes):
    answers(f"gpu*|{limit}\\n")
    check_cluster([Asked("train_policy", "gpu", "physics", minutes)], "sacct")
    with pytest.raises(UserError, match=f"more than the {minutes} minutes"):
        check_cluster([Asked("train_policy", "gpu", "physics", minutes + 1)], "sacct")


def test_mps_needs_apple_silicon():
    with pytest.raises(UserError, match="device is mps, which needs Apple silicon"):
        pick_device("mps")
