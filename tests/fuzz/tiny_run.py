"""One iteration of the tiny workflow of tests/workflow, in a copy of the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# The programs use all cores, as in a user's run.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
POLICY = "results/tiny/iter1/policy"
EVALUATION = "results/tiny/iter1/alpaca_eval.json"


def make_copy(folder: Path, copy_repository: Callable[[Path], Path]) -> Path:
    """Copy the repository's files known to git, and the embedded model if it exists."""
    copy = copy_repository(folder)
    if (REPOSITORY / "results/models").is_dir():
        shutil.copytree(
            REPOSITORY / "results/models", copy / "results/models", copy_function=os.link
        )
    return copy


def command(policy: Path, *targets: str, flags: tuple[str, ...] = ()) -> list[str]:
    """The command that runs Snakemake for these targets, with one shard."""
    config = [
        f"policy={{model: {policy}}}",
        "iterations=1",
        "responses={samples: 3, max_new_tokens: 12, batch_size: 18, shards: 1, precision: float32}",
    ]
    return [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "2",
        *flags,
        "--configfile",
        "tests/workflow/config.yaml",
        "--config",
        *config,
        "--",
        *targets,
    ]


def finish(copy: Path, words: list[str]) -> str:
    """Run a command, which must succeed, and return its output."""
    done = subprocess.run(
        words,
        cwd=copy,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=ENVIRONMENT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def records(copy: Path) -> dict[str, dict[str, Any]]:
    """The parts of the records that must be equal in two runs, by artifact."""
    found = {}
    for file in sorted((copy / "results/tiny").rglob("*.record.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        artifact = record["artifact"]
        keys = ["inputs", "stage", "arguments"]
        if not artifact.endswith("train_log.jsonl"):  # It contains tokens per second.
            keys.append("sha256")
        found[artifact] = {key: record[key] for key in keys}
    return found


def half_written(copy: Path) -> list[Path]:
    """Temporary files, locks, work folders, and records without their artifacts."""
    root = copy / "results/tiny"
    found = []
    for pattern in ("*.tmp", ".*.work", ".*.lock"):
        found += root.rglob(pattern)
    for record in root.rglob("*.record.json"):
        if not Path(str(record).removesuffix(".record.json")).exists():
            found.append(record)
    return found
