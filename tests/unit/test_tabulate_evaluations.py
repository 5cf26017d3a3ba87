"""The table of all evaluations, with a dash for each missing value."""

from __future__ import annotations

import csv

import pytest

import tabulate_evaluations
import tabulate_methods
from sppo.core.artifacts import write_json
from sppo.core.errors import UserError


@pytest.fixture
def results(tmp_path):
    judged = {
        "win_rate": 55.04,
        "win_rate_interval": [50.0, 60.0],
        "length_controlled_winrate": 52.0,
        "length_controlled_winrate_interval": None,
        "avg_length": 400,
        "n_total": 100,
        "judge": "judge",
        "reference": "base",
    }
    write_json(tmp_path / "iter1/alpaca_eval.json", judged)
    write_json(tmp_path / "iter1/pairs.parquet.record.json", {"pairs": 31})
    write_json(
        tmp_path / "iter1/mt_bench.json",
        {
            "average": 5.678,
            "first_turn": 6.0,
            "second_turn": None,
            "against_base": {"win_rate": 51.0},
            "questions": 32,
            "data": "data/mt_bench",
            "judge": "judge",
        },
    )
    write_json(tmp_path / "k2/iter1/ranker_estimate.json", {"win_rate": 61.0})
    write_json(
        tmp_path / "k2/iter1/open_llm.json",
        {"arc_challenge": 25.0, "average": 30.0, "data": "hub", "shots": {"mmlu": 5}},
    )
    return tmp_path


def test_every_value_is_in_its_row_and_column(results, program):
    program(
        tabulate_evaluations,
        "--results",
        results,
        "--files",
        *sorted(results.rglob("*.json")),
        "--output",
        results / "tables/evaluations.md",
    )

    with (results / "tables/evaluations.csv").open(newline="") as stream:
        main, k2 = csv.DictReader(stream)
    of_main = {
        "run": "main",
        "iteration": "1",
        "pairs": "31",
        "win rate [95%]": "55.0 [50.0, 60.0]",
        "LC win rate [95%]": "52.0",
        "MT-Bench": "5.68",
        "turn 2": "-",
        "MT-Bench won against the base": "51.0",
        "Open LLM: average": "-",
    }
    of_k2 = {
        "run": "k2",
        "by the preference model": "61.0",
        "win rate [95%]": "-",
        "Open LLM: arc_challenge": "25.0",
        "Open LLM: mmlu": "-",
    }
    assert {key: main[key] for key in of_main} == of_main
    assert {key: k2[key] for key in of_k2} == of_k2
    for suffix in ("md", "html"):
        text = (results / f"tables/evaluations.{suffix}").read_text()
        assert "55.0 [50.0, 60.0]" in text
        assert "100 instructions, judged by judge against base" in text


def test_files_of_another_experiment_are_refused(results, program, tmp_path):
    with pytest.raises(UserError, match="is not in"):
        program(
            tabulate_evaluations,
            "--results",
            results / "k2",
            "--files",
            results / "iter1/mt_bench.json",
            "--output",
            results / "x.md",
        )


@pytest.mark.parametrize("module", [tabulate_evaluations, tabulate_methods])
def test_table_of_nothing_is_one_line(module, program, tmp_path):
    plot = ["--plot", tmp_path / "m.png"] if module is tabulate_methods else []
    words = ("--results", tmp_path, "--files", "--output", tmp_path / "t.md", *plot)
    with pytest.raises(UserError, match="has been evaluated; make an alpaca_eval.json first"):
        program(module, *words)
    assert list(tmp_path.iterdir()) == []
