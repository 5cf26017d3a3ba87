"""The comparison of speeds: its rows on a tiny policy, and the error without a finished run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from training_runs import make_pairs

from sppo.core.artifacts import record_path, write_json
from sppo.core.tables import write_table

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"


def run(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, PROGRAM, *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
    )


def test_each_stage_has_a_row(tmp_path, tiny_policy):
    (tmp_path / "iter0").mkdir()
    (tmp_path / "iter0/policy").symlink_to(tiny_policy)
    write_table(tmp_path / "iter1/pairs.parquet", make_pairs(8), "pairs")
    prompts = [
        {
            "prompt_id": f"p{number}",
            "category": "",
            "messages": [{"role": "user", "content": "Name a colour." * (number + 1)}],
            "prompt_token_ids": [1] * (number + 3),
            "source": "test",
        }
        for number in range(3)
    ]
    write_table(tmp_path / "iter1/prompts.parquet", prompts, "prompts")
    for t, seconds in ((1, 5.0), (2, 7.0)):  # of which 4 and 5 were work
        table = tmp_path / f"benchmarks/iter{t}/train_policy.tsv"
        table.parent.mkdir(parents=True)
        table.write_text(f"s\th:m:s\n{seconds}\t0:00:05\n")
        write_json(record_path(tmp_path / f"iter{t}/policy"), {"sha256": "0", "seconds": 3.0 + t})
    options = ("--tokens", 3, "--precision", "float32", "--no-pairrm", "--no-demo", "--json")
    done = run("--results", tmp_path, *options)
    assert done.returncode == 0, done.stderr
    *rows, job, plan = [
        json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")
    ]
    trainings = ["training, LoRA of rank 16", "training, all weights"]
    stages = ["generation", "scoring", *trainings]
    assert sorted((row["baseline"], row["stage"]) for row in rows) == sorted(
        [
            ("transformers", "generation"),
            *(("TRL", stage) for stage in trainings),
            *(("freed memory returned", stage) for stage in stages),
            ("our training of all weights", "scoring"),
            ("forward passes of our training", "scoring"),
        ]
    )
    goals = {(row["stage"], row["baseline"]): row["goal"] for row in rows if row["goal"]}
    assert goals == {
        ("generation", "transformers"): 3,
        ("scoring", "forward passes of our training"): 2,
        **{(stage, "TRL"): 2.5 for stage in trainings},
    }
    for row in rows:
        assert row["ratio"] == row["ours"] / row["theirs"] > 0
        assert row["limit"] > 0
    assert job == {"job": "train_policy", "seconds": 6.0, "start_up": 1.5}
    assert plan["job"] == "snakemake -n"
    assert 0 < plan["seconds"] == plan["start_up"]


def test_a_run_is_needed(tmp_path):
    done = run("--results", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("run make demo first")
