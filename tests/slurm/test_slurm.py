"""The shipped Slurm profile on a real Slurm.

Shards run side by side; jobs are killed or run out of time; Snakemake is interrupted and killed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.slurm import one_machine
from tests.slurm.one_machine import slurm
from tests.workflow.test_workflow import ENVIRONMENT, make_clone, redone, snakemake, times

pytestmark = pytest.mark.slow
PROFILE = "profiles/slurm/config.yaml"
SPY = Path(__file__).with_name("spy")
EDITED = {"your_account": one_machine.ACCOUNT, "your_partition": "gpu"}
WITHOUT_ACCOUNTING = {
    "  slurm_account: your_account": "#",
    "# slurm-status-command": "slurm-status-command",
    "your_partition": "gpu",
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory, tiny_policy, copy_repository):
    """The clone of the workflow's tests, at a path without spaces.

    Slurm's executor does not quote paths.
    """
    return make_clone(copy_repository, tmp_path_factory.mktemp("clone") / "sppo", tiny_policy)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Slurm's programs, and the executor plugin for Snakemake in a separate folder."""
    if reason := one_machine.refusal():
        pytest.skip(reason)
    one_machine.install()
    plugin = tmp_path_factory.mktemp("plugin")
    requirements = SPY.parents[2] / "requirements-slurm.txt"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", plugin, "-r", requirements], check=True, timeout=300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "PYTHONPATH", f"{SPY}:{plugin}")
        yield


@pytest.fixture(scope="module")
def cluster(installed, clone, tmp_path_factory):
    # Another Slurm has written the file, and its jobs have the same numbers.
    (clone[0] / "started.jsonl").unlink(missing_ok=True)
    with one_machine.running(tmp_path_factory.mktemp(one_machine.MARK), accounting=True):
        yield


def start(
    clone, *targets: str, edits: dict[str, str] = EDITED, more: tuple[str, ...] = ()
) -> subprocess.Popen:
    """Start Snakemake with the profile after a user's edits.

    It asks for the state of the jobs more often than on a real cluster.
    """
    folder, policy = clone
    profile = (SPY.parents[2] / PROFILE).read_text(encoding="utf-8")
    for old, new in edits.items():
        assert old in profile
        profile = profile.replace(old, new)
    (folder / PROFILE).write_text(profile, encoding="utf-8")
    # A process that a shell starts in the background ignores Ctrl-C, and its children inherit this.
    # env restores the default.
    words = [
        "env",
        "--default-signal=INT",
        sys.executable,
        "-m",
        "snakemake",
        "--workflow-profile",
        "profiles/slurm",
        "--configfile",
        "tests/workflow/config.yaml",
        "--config",
        f"policy={{model: {policy}}}",
        "--latency-wait",
        "5",
        "--slurm-init-seconds-before-status-checks",
        "2",
        "--seconds-between-status-checks",
        "2",
        *more,
        "--",
        *targets,
    ]
    environment = ENVIRONMENT | {
        "SPPO_STARTED": str(folder / "started.jsonl"),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    with (folder / "snakemake.out").open("w") as output:
        return subprocess.Popen(
            words, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def finish(clone, process: subprocess.Popen, status: int = 0) -> str:
    """Wait for the end of Snakemake, check its exit status and return its output."""
    try:
        process.wait(timeout=900)
    finally:
        process.kill()
    output = (clone[0] / "snakemake.out").read_text(encoding="utf-8")
    assert process.returncode == status, output[-5000:]
    return output


def run(clone, *targets: str, status: int = 0, **how) -> str:
    return finish(clone, start(clone, *targets, **how), status)


def started(clone, program: str) -> list[dict]:
    """All starts of a program so far."""
    notes = clone[0] / "started.jsonl"
    lines = notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []
    return [start for start in map(json.loads, lines) if start["program"] == program]


def jobs(rule: str) -> list[dict[str, str]]:
    """The jobs of a rule in the order of submission, as `scontrol show job` describes them."""
    lines = slurm("scontrol", "--oneliner", "show", "jobs").splitlines()
    all_jobs = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]
    found = [job for job in all_jobs if f"{job.get('Comment', '')}_".startswith(f"rule_{rule}_")]
    return sorted(found, key=lambda job: int(job["JobId"]))


def until(holds: Callable[[], object], process: subprocess.Popen | None = None):
    """Wait until `holds` gives a true value while the process runs, and return the value."""
    deadline = time.monotonic() + 300
    while not (found := holds()):
        assert process is None or process.poll() is None, "the process has ended"
        assert time.monotonic() < deadline, "the time is over"
        time.sleep(0.1)
    return found


def one_error(output: str) -> str:
    """The only error line of the output, which must have no traceback and no submitted job."""
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output, output
    assert "sbatch" not in output, output
    return line


def test_jobs_run_on_a_cluster_without_accounting(installed, clone, tmp_path_factory):
    target = "results/tiny/tables/all.md"
    with one_machine.running(tmp_path_factory.mktemp(one_machine.MARK), accounting=False):
        assert "remove the # before slurm-status-command" in one_error(run(clone, target, status=1))
        with_account = {"# slurm-status-command": "slurm-status-command"} | EDITED
        assert "this cluster does not keep accounts; delete the line" in one_error(
            run(clone, target, status=1, edits=with_account)
        )

        run(clone, target, edits=WITHOUT_ACCOUNTING)

        assert [job["JobState"] for job in jobs("paper_tables")] == ["COMPLETED"]
    assert (clone[0] / target).is_file()


def test_impossible_run_is_a_one_line_error_before_any_job(cluster, clone):
    def said(edits: dict[str, str]) -> str:
        return one_error(run(clone, "results/tiny/iter1/policy", status=1, edits=edits))

    assert "slurm_account is your_account, but root may use physics" in said({})
    assert "slurm_partition is your_partition, but this cluster has gpu, short" in said(
        {"your_account": "physics"}
    )
    limited = run(clone, "results/tiny/iter1/policy", status=1, more=("--resources", "gpu=1"))
    assert "train_policy asks for 8 GPUs, but at most 1" in one_error(limited)
    too_short = said(EDITED | {"your_partition": "short"})
    assert (
        "more than the 30 minutes that partition short allows (train_policy for 1440)" in too_short
    )
    assert PROFILE in too_short
    assert not slurm("squeue", "--states=all", "--noheader")


def test_shards_run_in_parallel_on_separate_gpus(cluster, clone):
    run(clone, "results/tiny/iter1/pairs.parquet")

    for rule, program in (
        ("generate_responses", "src/generate_responses.py"),
        ("annotate_preferences", "src/annotate_preferences.py"),
    ):
        first, second = jobs(rule)
        assert first["JobState"] == second["JobState"] == "COMPLETED"
        last_start = max(first["StartTime"], second["StartTime"])
        assert last_start < min(first["EndTime"], second["EndTime"])
        started_jobs = sorted(start["job"] for start in started(clone, program))
        assert started_jobs == sorted((first["JobId"], second["JobId"]))
        gpus = [start["gpus"] for start in started(clone, program)]
        assert len(set(gpus)) == 2
        assert all(re.fullmatch("[0-7]", gpu) for gpu in gpus)


def test_killed_and_timed_out_jobs_are_resubmitted(cluster, clone):
    process = start(clone, "results/tiny/iter1/policy")
    killed = until(lambda: started(clone, "src/score_reference.py"), process)[0]
    os.kill(killed["pid"], signal.SIGKILL)
    hung = until(lambda: started(clone, "src/train_policy.py"), process)[0]
    os.kill(hung["pid"], signal.SIGSTOP)
    slurm("scontrol", "update", f"JobId={hung['job']}", "TimeLimit=1")
    output = finish(clone, process)

    # There are two shards. One of their jobs was killed and submitted again.
    scored = jobs("score_reference")
    assert sorted(job["JobState"] for job in scored) == ["COMPLETED", "COMPLETED", "FAILED"]
    assert [job["JobState"] for job in jobs("train_policy")] == ["TIMEOUT", "COMPLETED"]
    assert f"SLURM-job '{hung['job']}' failed, SLURM status is: 'TIMEOUT'" in output
    assert sorted(job["TimeLimit"] for job in scored) == ["04:00:00", "04:00:00", "08:00:00"]
    assert sorted(job["MinMemoryNode"] for job in scored) == ["125G", "62.50G", "62.50G"]
    assert jobs("train_policy")[1]["TimeLimit"] == "16:00:00"


def test_stopped_snakemake_loses_no_finished_stage(cluster, clone):
    target, root = "results/tiny/iter2/alpaca_eval.json", clone[0] / "results/tiny"
    done = {
        str(path.relative_to(root)).removesuffix(".record.json")
        for path in (root / "iter1").rglob("*.record.json")
    } | {"iter0/policy"}
    finished = times(clone)
    assert {"iter1/policy", "iter1/responses/1.parquet"} <= done <= finished.keys()

    before = len(started(clone, "src/generate_responses.py"))
    process = start(clone, target)
    until(lambda: len(started(clone, "src/generate_responses.py")) > before, process)
    os.kill(process.pid, signal.SIGINT)
    finish(clone, process, 1)
    until(lambda: not slurm("squeue", "--noheader"))
    assert jobs("generate_responses")[-1]["JobState"] == "CANCELLED"

    before = len(started(clone, "src/generate_responses.py"))
    process = start(clone, target)
    until(lambda: len(started(clone, "src/generate_responses.py")) > before, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished |= {"iter2/prompts.parquet": times(clone)["iter2/prompts.parquet"]}
    assert "--unlock" in run(clone, target, status=1)
    # The command is from docs/cluster.md.
    subprocess.run(
        "squeue --me --noheader --format '%i %j %Z' |"
        " awk -v here=\"$(pwd -P)\" '$2 ~ /^sppo/ && $3 == here {print $1}' | xargs -r scancel",
        shell=True,
        check=True,
        cwd=clone[0],
    )
    run(clone, target, more=("--unlock",))
    run(clone, target)

    assert not (done | {"iter2/prompts.parquet"}) & redone(finished, times(clone))
    result = json.loads((clone[0] / target).read_text(encoding="utf-8"))
    assert 0 <= result["win_rate"] <= 100
    assert "Nothing to be done" in run(clone, target)
    assert "Nothing to be done" in snakemake(clone, target)  # without Slurm


def test_job_starts_one_program_and_training_has_the_node(cluster, clone):
    lines = (clone[0] / "started.jsonl").read_text(encoding="utf-8").splitlines()
    # The program of a local rule has no job.
    counted = Counter(start["job"] for start in map(json.loads, lines) if start["job"])
    assert set(counted.values()) == {1}
    trainings = started(clone, "src/train_policy.py")
    assert len(trainings) == 3
    assert {start["gpus"] for start in trainings} == {"0,1,2,3,4,5,6,7"}
    assert {start["job"] for start in trainings} == {
        job["JobId"] for job in jobs("train_policy") if job["JobState"] != "CANCELLED"
    }
