"""Best of n and best of Nash on preferences whose best answer and equilibrium are known."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import pick_best_of_n
from sppo.core.artifacts import read_json, record_path, write_json

# A, B and C are the answers to each instruction, in this order.
PREFERENCES = {
    # A beats B beats C beats A, so each answer has a third of the equilibrium.
    "cycle": [[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]],
    # A beats both by little, B beats C by much: B has the highest mean, A beats each other one.
    "narrow": [[0.5, 0.51, 0.51], [0.49, 0.5, 0.99], [0.49, 0.01, 0.5]],
}
FUNCTION = """
import numpy as np

def {name}(prompt, responses):
    return np.array({matrix})
"""


@pytest.fixture
def pick(tmp_path, program):
    """Run the program on 300 instructions; returns the picked answers and the record."""

    def run(name: str, *flags: object):
        file = tmp_path / f"{name}.py"
        file.write_text(FUNCTION.format(name=name, matrix=PREFERENCES[name]), encoding="utf-8")
        answers = [
            {"instruction": f"question {number}", "sample_id": sample, "output": output}
            for number in range(300)
            for sample, output in enumerate("ABC")
        ]
        write_json(tmp_path / "answers.json", answers)
        output: Path = tmp_path / "picked.json"
        program(
            pick_best_of_n,
            *("--answers", tmp_path / "answers.json", "--n", 3, "--model", f"{file}:{name}"),
            *("--generator", "x", "--output", output, "--device", "cpu", *flags),
        )
        return [row["output"] for row in read_json(output)], read_json(record_path(output))

    return run


def test_nash_draws_from_a_cycle_evenly_and_by_seed(pick):
    picked, record = pick("cycle", "--choice", "nash", "--seed", 1)
    counts = Counter(picked)
    # 100 on average, with a standard deviation of 8.
    assert all(60 < counts[answer] < 140 for answer in "ABC")
    assert record["mean_support"] == 3
    assert record["cyclic_triples"] == record["cyclic_prompts"] == 1
    assert record["condorcet_winner"] == 0
    again, _ = pick("cycle", "--choice", "nash", "--seed", 1)
    other, _ = pick("cycle", "--choice", "nash", "--seed", 2)
    assert picked == again != other


def test_nash_takes_the_answer_that_beats_each_other_one(pick):
    by_mean, record = pick("narrow")
    by_nash, _ = pick("narrow", "--choice", "nash")
    assert set(by_mean) == {"B"}
    assert set(by_nash) == {"A"}
    assert record["condorcet_winner"] == 1
    assert "mean_support" not in record
