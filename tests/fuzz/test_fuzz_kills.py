"""The tiny workflow is killed repeatedly; its artifacts must equal those of an undisturbed run.

FUZZ=2 kills twice as often.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.fuzz.tiny_run import (
    ENVIRONMENT,
    EVALUATION,
    POLICY,
    command,
    finish,
    half_written,
    make_copy,
    records,
)

KILLS = 9 * int(os.environ.get("FUZZ", "1"))
pytestmark = pytest.mark.slow


def start(copy: Path, words: list[str]) -> subprocess.Popen:
    """Start a command in its own process group, so that the group can be killed."""
    return subprocess.Popen(
        words,
        cwd=copy,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def unlock(copy: Path, policy: Path) -> None:
    """Remove Snakemake's lock, which a killed run leaves."""
    finish(copy, command(policy, flags=("--unlock",)))


def wait_for(condition: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Wait for a condition, at most 300 s and as long as the process runs."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.02)


def test_killed_at_random_moments(finished, tmp_path, tiny_policy, copy_repository):
    whole, _ = finished
    copy = make_copy(tmp_path / "sppo", copy_repository)
    draw = random.Random(0)
    killed = 0
    for number in range(KILLS):
        process = start(copy, command(tiny_policy, POLICY, EVALUATION))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(4, 20))
        if process.poll() is None:
            killed += 1
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            unlock(copy, tiny_policy)
        elif number > KILLS // 2:
            break
    finish(copy, command(tiny_policy, POLICY, EVALUATION))
    assert killed > 2
    assert records(copy) == records(whole)
    assert not half_written(copy)


def test_snakemake_alone_is_killed_while_the_trainer_works(
    finished, tmp_path, tiny_policy, copy_repository
):
    """The trainer continues as an orphan, and the trainer of the next run waits for it.

    The test stops the orphan until the other trainer waits.
    """
    whole, _ = finished
    copy = make_copy(tmp_path / "sppo", copy_repository)
    lock = copy / "results/tiny/iter1/.policy.lock"
    log = copy / "results/tiny/logs/iter1/train_policy.log"
    process = start(copy, command(tiny_policy, POLICY))
    wait_for(lambda: lock.is_file() and "process" in lock.read_text(), process)
    orphan = int(re.search(r"process (\d+)", lock.read_text())[1])
    os.kill(orphan, signal.SIGSTOP)
    try:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        unlock(copy, tiny_policy)
        again = start(copy, command(tiny_policy, POLICY))
        wait_for(lambda: log.is_file() and f"process {orphan} on" in log.read_text(), again)
    finally:
        os.kill(orphan, signal.SIGCONT)
    wait_for(lambda: (copy / POLICY).is_dir(), again)
    weights_of_orphan = (copy / POLICY / "model.safetensors").stat()
    assert again.wait(300) == 0
    text = log.read_text()
    assert "waiting for its end" in text
    assert "has been made meanwhile" in text
    assert os.path.samestat(weights_of_orphan, (copy / POLICY / "model.safetensors").stat())
    ours = records(copy)
    assert POLICY in ours
    assert ours == {name: record for name, record in records(whole).items() if name in ours}
    assert not half_written(copy)
