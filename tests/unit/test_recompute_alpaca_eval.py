"""Leaderboard rows from annotations: published rows, alignment by instruction, bad input."""

import json
import os
import random
import sys
from pathlib import Path

import pandas as pd
import pytest

import recompute_alpaca_eval as program
from sppo.core.errors import UserError
from sppo.evaluation import alpaca_eval

# A folder with public data sets. Tests that need it are skipped if it does not exist.
PUBLIC_DATA = Path(os.environ.get("SPPO_PUBLIC_DATA", "/nonexistent"))
needs_public_data = pytest.mark.skipif(
    not PUBLIC_DATA.is_dir(), reason="the published annotations are not on this machine"
)
DIFFICULTY = ("--difficulty", PUBLIC_DATA / "alpaca_eval_df_gamed_reconstructed.csv")
FILES = {
    1: (
        "alpaca_eval_1_gpt4_annotations.parquet",
        "data_AlpacaEval/alpaca_eval_gpt4_leaderboard.csv",
    ),
    2: (
        "alpaca_eval_2_gpt4_turbo_annotations.parquet",
        "data_AlpacaEval_2/weighted_alpaca_eval_gpt4_turbo_leaderboard.csv",
    ),
}


def rows(n=40, model="policy"):
    rng = random.Random(0)
    return [
        {
            "instruction": f"question {i}",
            "output_1": "a" * rng.randint(1, 90),
            "generator_1": "base",
            "output_2": "b" * rng.randint(1, 90),
            "generator_2": model,
            "preference": 1 + rng.random(),
        }
        for i in range(n)
    ]


def recompute(monkeypatch, capsys, path, *flags):
    monkeypatch.setattr(
        sys, "argv", ["recompute_alpaca_eval.py", "--annotations", str(path), *map(str, flags)]
    )
    program.main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@needs_public_data
@pytest.mark.parametrize("version", [1, 2])
def test_the_leaderboard_of_the_package_is_reproduced(monkeypatch, capsys, version):
    import alpaca_eval

    file, board = FILES[version]
    listed = pd.read_csv(Path(alpaca_eval.__file__).parent / "leaderboards" / board, index_col=0)
    difficulty = DIFFICULTY if version == 2 else ()
    recomputed = recompute(monkeypatch, capsys, PUBLIC_DATA / file, *difficulty)
    found = [row for row in recomputed if row["model"] in listed.index]
    assert len(found) >= 46
    for row in found:
        published = listed.loc[row["model"]]
        assert row["win_rate"] == pytest.approx(published["win_rate"], abs=1e-9)
        assert row["standard_error"] == pytest.approx(published["standard_error"], abs=1e-9)
        assert row["n_total"] == published["n_total"]
        # The AlpacaEval 1 annotations of falcon-7b-instruct are not of its published outputs.
        if row["model"] != "falcon-7b-instruct" or version == 2:
            allowed = 2 if "absent" in row.get("note", "") else 0
            assert abs(row["avg_length"] - published["avg_length"]) <= allowed
        if version == 2:
            assert row["lc_source"].endswith("approximate")
            lc = row.get(
                "length_controlled_winrate_by_place_in_file", row["length_controlled_winrate"]
            )
            assert lc == pytest.approx(published["length_controlled_winrate"], abs=0.9)


@needs_public_data
def test_rows_are_aligned_by_instruction(monkeypatch, capsys, tmp_path):
    frame = pd.read_parquet(PUBLIC_DATA / FILES[2][0])
    frame = frame[frame["model"] == frame["model"].iloc[0]].drop(columns=["row"])
    shuffled = tmp_path / "annotations.json"
    frame.sample(frac=1, random_state=0).to_json(shuffled, orient="records")
    ordered = tmp_path / "ordered.json"
    frame.to_json(ordered, orient="records")
    [one] = recompute(monkeypatch, capsys, ordered, *DIFFICULTY)
    [other] = recompute(monkeypatch, capsys, shuffled, *DIFFICULTY)
    assert other["length_controlled_winrate"] == pytest.approx(
        one["length_controlled_winrate"], abs=1e-9
    )
    assert "by place" not in one.get("note", "")
    assert "by place" in other["note"]


def test_annotations_of_two_models_give_two_rows(monkeypatch, capsys, tmp_path):
    """The instructions are not those of AlpacaEval; one annotation has no preference."""
    file = tmp_path / "annotations.json"
    without_preference = rows(13, "other")[-1] | {"preference": None}
    file.write_text(json.dumps([*rows(), *rows(12, "other"), without_preference]))
    one, other = recompute(monkeypatch, capsys, file)
    assert (one["model"], one["n_total"]) == ("policy", 40)
    assert (other["model"], other["n_total"]) == ("other", 12)
    assert one["win_rate"] == pytest.approx(100 * sum(row["preference"] - 1 for row in rows()) / 40)
    assert "not the leaderboard's" in one["lc_source"]
    assert "note" not in one
    assert "1 annotations" in other["note"]


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("no file", "do not exist"),
        ("cut file", "not"),
        ("no column", "no column preference"),
        ("repeated row", "two annotations"),
        ("few rows", "at least 5"),
        ("no difficulty", "does not exist"),
        ("other instructions", "not one of AlpacaEval's"),
    ],
)
def test_bad_input_is_a_one_line_error(monkeypatch, capsys, tmp_path, case, says):
    file = tmp_path / "annotations.json"
    difficulty = tmp_path / "df_gamed.csv"
    flags = []
    table = rows()
    if case == "no column":
        for row in table:
            del row["preference"]
    if case == "repeated row":
        table = table + table[:1]
    if case == "few rows":
        table = table[:3]
    text = json.dumps(table)
    if case == "cut file":
        text = text[:50]
    if case != "no file":
        file.write_text(text)
    if case in ("no difficulty", "other instructions"):
        flags = ["--difficulty", difficulty]
    if case == "other instructions":
        difficulty.write_text(
            "preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline,model\n"
        )
    with pytest.raises(UserError, match=says) as error:
        recompute(monkeypatch, capsys, file, *flags)
    assert "\n" not in str(error.value)


def test_a_wrong_order_of_the_805_is_refused(tmp_path):
    with pytest.raises(UserError, match="by position"):
        alpaca_eval.check_order([{"instruction": "not one of them"}], tmp_path / "df_gamed.csv")
