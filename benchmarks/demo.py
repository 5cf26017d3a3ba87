"""The time of a whole run now, beside that of an earlier commit for the same work.

    .venv/bin/python benchmarks/demo.py     # a quarter of an hour on two cores

Both commits are cloned into a temporary folder and run in this environment, today's first, from
the prompts to results/iter3/alpaca_eval.json: three iterations of 24 open-ended prompts with 5
responses of at most 64 tokens, training of all weights, and 100 instructions before and after. This
was the demo until commit 7cfe2db. No artifact exists before, and the time includes Snakemake and
the start of every job. It prints seconds, and the share of the earlier time. benchmarks/run.py has
it as a row.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))

import sppo  # noqa: F401  (sets OMP_WAIT_POLICY before torch is imported)

from sppo.core.errors import UserError, run

EARLIER = "7cfe2db"
RESULT = "results/iter3/alpaca_eval.json"
# What was the demo's configuration at `EARLIER`, for today's code.
SAME_WORK = """
extends: config/presets/laptop.yaml
name: ""
prompts: {per_iteration: 24}
responses: {max_new_tokens: 64}
train: {learning_rate: 4.0e-5, batch_size: 8}
alpaca_eval: {limit: 100, max_new_tokens: 64, length_controlled_bootstrap: 100}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="only plan today's jobs")
    args = parser.parse_args()
    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            run_now(Path(folder), "--dry-run")
        print("the same work can be planned")
        return
    now, then = seconds()
    print(f"the demo of {EARLIER}: {then:.0f} s then, {now:.0f} s now, {now / then:.2f} of it")


def seconds() -> tuple[float, float]:
    """Seconds of the run now, and at the earlier commit."""
    with tempfile.TemporaryDirectory() as folder:
        earlier = clone(EARLIER, Path(folder) / "earlier")
        return run_now(Path(folder)), snakemake(earlier, RESULT)


def run_now(folder: Path, *words: str) -> float:
    """Seconds of the run with the code of the last commit, in a clone in this folder."""
    now = clone("HEAD", folder / "now")
    (now / "same_work.yaml").write_text(SAME_WORK, encoding="utf-8")
    return snakemake(now, *words, RESULT, "--configfile", "same_work.yaml")


def has_history() -> bool:
    """Whether this repository has the earlier commit."""
    words = ["git", "-C", str(REPOSITORY), "cat-file", "-e", f"{EARLIER}^{{commit}}"]
    return subprocess.run(words, capture_output=True).returncode == 0


def clone(commit: str, folder: Path) -> Path:
    """This repository at a commit, with this environment. UserError if it has no such commit."""
    try:
        for words in (
            ["clone", "--quiet", "--shared", "--no-checkout", str(REPOSITORY), str(folder)],
            ["-C", str(folder), "checkout", "--quiet", commit],
        ):
            subprocess.run(["git", *words], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"this repository has no commit {commit}; run git fetch --unshallow first"
        ) from error
    (folder / ".venv").symlink_to(REPOSITORY / ".venv")
    return folder


def snakemake(folder: Path, *words: str) -> float:
    """Seconds of a run. UserError if it fails."""
    began = time.perf_counter()
    done = subprocess.run(
        [folder / ".venv/bin/snakemake", "--cores", "all", *words],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
        raise UserError(
            f"the run in {folder.name} failed: {last}; run its command alone to see more"
        )
    return time.perf_counter() - began


if __name__ == "__main__":
    run(main)
