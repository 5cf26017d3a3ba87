"""One iteration of the tiny workflow, as tests/workflow has it, in a copy of the repository."""

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
ENVIRONMENT = {
    key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"
}  # all cores, as a user has
POLICY, EVALUATION = "results/tiny/iter1/policy", "results/tiny/iter1/alpaca_eval.json"


def make_copy(folder: Path, copy_repository: Callable[[Path], Path]) -> Path:
    """The repository as git sees it, and the embedded model if it is made."""
    copy = copy_repository(folder)
    if (REPOSITORY / "results/models").is_dir():
        shutil.copytree(
            REPOSITORY / "results/models", copy / "results/models", copy_function=os.link
        )
    return copy


def command(policy: Path, *targets: str, flags: tuple[str, ...] = ()) -> list[str]:
    """A call of Snakemake for these targets, with one shard."""
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
    """Run to the end; returns what was printed."""
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
    """What the records say that two runs have in common, by artifact."""
    found = {}
    for file in sorted((copy / "results/tiny").rglob("*.record.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        found[record["artifact"]] = {
            key: record[key] for key in ("sha256", "inputs", "stage", "arguments")
        }
        if record["artifact"].endswith("train_log.jsonl"):  # it tells tokens a second
            del found[record["artifact"]]["sha256"]
    return found


def half_written(copy: Path) -> list[Path]:
    """Temporary files, locks, work folders, and records without their artifacts."""
    root = copy / "results/tiny"
    left = [path for pattern in ("*.tmp", ".*.work", ".*.lock") for path in root.rglob(pattern)]
    return left + [
        path
        for path in root.rglob("*.record.json")
        if not Path(str(path).removesuffix(".record.json")).exists()
    ]
