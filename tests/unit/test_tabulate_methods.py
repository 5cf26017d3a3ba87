"""The table of methods: results and costs. Each run has the costs of a shared first iteration."""

from __future__ import annotations

import csv

import pytest

import tabulate_methods
from sppo.core.artifacts import read_json, write_json
from sppo.core.errors import UserError


def judged(lc, low, high):
    return {
        "win_rate": lc + 1,
        "win_rate_interval": [low + 1, high + 1],
        "length_controlled_winrate": lc,
        "length_controlled_winrate_interval": [low, high],
        "avg_length": 400,
        "reference_avg_length": 420,
        "n_total": 100,
        "judge": "judge",
        "reference": "base",
    }


@pytest.fixture
def results(tmp_path):
    write_json(tmp_path / "iter0/alpaca_eval.json", judged(50, 45, 55))
    write_json(tmp_path / "iter1/alpaca_eval.json", judged(70, 65, 75))
    write_json(tmp_path / "iter1/ranker_estimate.json", {"win_rate": 72.0})
    write_json(tmp_path / "dpo/iter1/alpaca_eval.json", judged(52, 48, 60))
    shared = [f"{tmp_path}/iter1/{folder}/0.parquet" for folder in ("responses", "preferences")]
    for path, tokens in zip(shared, ({"tokens": 1000}, {})):
        write_json(tmp_path / f"{path}.record.json", {"artifact": path, "seconds": 60.0, **tokens})
    for run, loss in (("", "sppo"), ("dpo/", "dpo")):
        write_json(
            tmp_path / run / "iter1/pairs.parquet.record.json",
            {"pairs": 28, "seconds": 0.0, "inputs": dict.fromkeys(shared, "hash")},
        )
        write_json(tmp_path / run / "iter1/logps/current/0.parquet.record.json", {"seconds": 30.0})
        write_json(
            tmp_path / run / "iter1/policy.record.json",
            {
                "seconds": 120.0,
                "tokens_an_epoch": 500,
                "arguments": {"loss": loss, "stop_epoch": 2.0},
            },
        )
    return tmp_path


def tabulated(results, program):
    program(
        tabulate_methods,
        "--results",
        results,
        "--files",
        *sorted(results.rglob("*.json")),
        "--output",
        results / "tables/methods.md",
        "--plot",
        results / "figures/methods.png",
    )
    with (results / "tables/methods.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_run_has_its_results_and_costs(results, program):
    base, main, dpo = tabulated(results, program)

    of_base = {"run": "main", "iteration": "0", "loss": "-", "minutes": "-"}
    of_main = {
        "loss": "sppo",
        "LC win rate [95%]": "70.0 [65.0, 75.0]",
        "by the preference model": "72.0",
        "pairs": "28",
        "tokens sampled": "1000",
        "minutes": "4.5",  # 60 + 60 + 30 + 120 s
    }
    of_dpo = {
        "loss": "dpo",
        "by the preference model": "-",
        "tokens trained": "1000",
        "tokens sampled": "1000",
        "minutes": "4.5",
    }
    for row, expected in ((base, of_base), (main, of_main), (dpo, of_dpo)):
        assert {key: row[key] for key in expected} == expected
    for file in ("tables/methods.md", "tables/methods.tex", "tables/methods.html"):
        assert "so this is no ranking" in (results / file).read_text()
    assert all((results / f"figures/methods.{form}").stat().st_size for form in ("png", "svg"))


def test_runs_with_another_judge_are_not_compared(results, program):
    file = results / "dpo/iter1/alpaca_eval.json"
    write_json(file, read_json(file) | {"judge": "ranker"})
    tabulated(results, program)
    text = (results / "tables/methods.md").read_text()
    assert "Rows of dpo have another judge, reference or number of instructions" in text


def test_doubtful_lc_win_rate_is_marked(results, program):
    doubtful = judged(52, 50, 60) | {"length_controlled_warning": "9.0% of its refits are 50"}
    write_json(results / "dpo/iter1/alpaca_eval.json", doubtful)
    *_, dpo = tabulated(results, program)
    text = (results / "tables/methods.md").read_text()
    assert dpo["LC win rate [95%]"] == "52.0 [50.0, 60.0] (!)"
    assert "dpo, iteration 1: (!) do not rely on the LC win rate: 9.0% of its refits are 50" in text


def test_no_evaluation_is_a_one_line_error(results, program):
    with pytest.raises(UserError, match="no run under .* has been evaluated"):
        program(
            tabulate_methods,
            "--results",
            results,
            "--files",
            results / "iter1/policy.record.json",
            "--output",
            results / "x.md",
            "--plot",
            results / "x.png",
        )
