"""An evaluation names its policy, and is refused in the folder of another policy."""

from __future__ import annotations

from pathlib import Path

import pytest

import make_tables
import plot_best_of_n
import summarize_run
from sppo.core.artifacts import write_json
from sppo.core.errors import UserError
from sppo.evaluation.results import check_policy, collect, read_evaluation

JUDGED = {
    "win_rate": 50.0,
    "win_rate_interval": None,
    "length_controlled_winrate": 49.0,
    "length_controlled_winrate_interval": None,
    "avg_length": 1,
    "reference_avg_length": 1,
    "n_total": 9,
    "judge": "judge",
    "judge_details": {},
    "reference": "base",
    "standard_error": 1.0,
}


@pytest.mark.parametrize(
    ("place", "policy"),
    [
        ("iter0", "sppo/iter0"),
        ("iter12", "sppo/iter12"),
        ("dpo/iter2", "sppo/dpo/iter2"),
        ("big/iter2", "big/iter2"),
        ("big/dpo/iter2", "big/dpo/iter2"),
        ("iter3/best_of_16", "sppo/iter3-best-of-16"),
        ("big/k2/iter3/best_of_4", "big/k2/iter3-best-of-4"),
        ("iter2", "results/iter2/policy"),
        ("big/dpo/iter2", "results/big/dpo/iter2/policy"),
        ("dpo/iter0", "results/iter0/policy"),
        ("results/iter1", "results/iter1"),
        ("iter1", None),
    ],
)
def test_evaluation_of_the_folder_s_policy_is_accepted(tmp_path, monkeypatch, place, policy):
    check_policy(tmp_path / "results" / place / "alpaca_eval.json", policy)
    monkeypatch.chdir(tmp_path)
    check_policy(Path("results") / place / "alpaca_eval.json", policy)


@pytest.mark.parametrize(
    ("place", "policy"),
    [
        ("iter2", "sppo/iter1"),
        ("iter2", "sppo/iter12"),
        ("iter12", "sppo/iter2"),
        ("iter2", "sppo/dpo/iter2"),
        ("dpo/iter2", "sppo/iter2"),
        ("dpo/iter2", "sppo/ipo/iter2"),
        ("big/iter2", "sppo/iter2"),
        ("iter2", "big/iter2"),
        ("iter3/best_of_16", "sppo/iter3"),
        ("iter3", "sppo/iter3-best-of-16"),
        ("iter3/best_of_16", "sppo/iter3-best-of-1"),
        ("iter2", "results/iter1/policy"),
        ("iter2", "results/iter0/policy"),
    ],
)
def test_evaluation_of_another_policy_is_refused(tmp_path, place, policy):
    with pytest.raises(
        UserError,
        match=f"{place}/alpaca_eval.json is of {policy}, which is not the policy of its folder; "
        "delete it and run again",
    ):
        check_policy(tmp_path / "results" / place / "alpaca_eval.json", policy)


def test_files_outside_results_are_not_checked(tmp_path):
    check_policy(tmp_path / "iter2" / "alpaca_eval.json", "sppo/iter1")


def test_every_reader_refuses_a_misplaced_evaluation(program, tmp_path):
    """The summary, the tables, the best-of-n plot and the upload check the policy's name."""
    results = tmp_path / "results"
    write_json(results / "iter1" / "alpaca_eval.json", JUDGED | {"policy": "sppo/iter1"})
    moved = results / "iter2" / "alpaca_eval.json"
    best = results / "iter1" / "best_of_2" / "alpaca_eval.json"
    for file in (moved, best):
        write_json(file, JUDGED | {"policy": "sppo/iter1"})
    with pytest.raises(UserError, match="iter2/alpaca_eval.json is of sppo/iter1"):
        program(
            summarize_run,
            "--results",
            results,
            "--evaluations",
            *sorted(results.glob("iter*/alpaca_eval.json")),
            "--output",
            results / "summary.md",
            "--plot",
            results / "a.png",
            "--length-plot",
            results / "b.png",
        )
    with pytest.raises(UserError, match="iter2/alpaca_eval.json is of sppo/iter1"):
        collect([moved], results)
    with pytest.raises(UserError, match="iter2/alpaca_eval.json is of sppo/iter1"):
        program(
            make_tables,
            "--results",
            results,
            "--base",
            "x",
            "--output",
            results / "tables" / "all.md",
        )
    with pytest.raises(UserError, match="best_of_2/alpaca_eval.json is of sppo/iter1"):
        program(
            plot_best_of_n,
            "--alpaca-eval",
            best,
            "--output",
            results / "n.csv",
            "--plot",
            results / "n.png",
        )
    assert sorted(path.name for path in results.iterdir()) == ["iter1", "iter2"]


def test_file_without_an_evaluation_is_a_one_line_error(tmp_path):
    (tmp_path / "alpaca_eval.json").write_text("[]")
    with pytest.raises(UserError, match="alpaca_eval.json is not an evaluation"):
        read_evaluation(tmp_path / "alpaca_eval.json")
