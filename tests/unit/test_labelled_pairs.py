"""Preference data sets in TRL's forms, and the agreement of any preference model with them."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))
sys.path.insert(0, str(ROOT / "src" / "tools"))

from sppo.core.errors import UserError, run  # noqa: E402
from sppo.preferences.labelled_pairs import read_labelled_pairs  # noqa: E402

USER = {"role": "user", "content": "Name a colour."}
LONG, SHORT = "A dark shade of red.", "Red."


def says(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


FORMS = {
    "texts": {"prompt": "Name a colour.", "chosen": LONG, "rejected": SHORT},
    "explicit prompt": {"prompt": [USER], "chosen": says(LONG), "rejected": says(SHORT)},
    "implicit prompt": {"chosen": [USER, *says(LONG)], "rejected": [USER, *says(SHORT)]},
    "both": {
        "prompt": "Name a colour.",
        "chosen": [USER, *says(LONG)],
        "rejected": [USER, *says(SHORT)],
    },
}


def written(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.parent.mkdir(exist_ok=True)
        pd.DataFrame(rows).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same_pair(tmp_path, form, suffix):
    frame, excluded = read_labelled_pairs(written(tmp_path / f"pairs{suffix}", [FORMS[form]]))
    (row,) = frame.to_dict("records")
    assert row["messages"] == [USER]
    assert (row["output_1"], row["output_2"], row["preference"]) == (LONG, SHORT, 1.0)
    assert (row["instruction"], row["subset"]) == ("Name a colour.", "all")
    assert not any(excluded.values())


def test_a_folder_is_read_whole(tmp_path):
    written(tmp_path / "data" / "a.parquet", [FORMS["explicit prompt"]])
    written(tmp_path / "data" / "b.parquet", [FORMS["explicit prompt"]])
    assert len(read_labelled_pairs(str(tmp_path / "data"))[0]) == 2


def test_unusable_rows_are_counted(tmp_path):
    other = {"role": "user", "content": "Name a bird."}
    rows = [
        FORMS["texts"],
        FORMS["texts"] | {"rejected": LONG},
        FORMS["texts"] | {"chosen": None},
        {"chosen": [USER, *says(LONG)], "rejected": [other, *says(SHORT)]},
    ]
    frame, excluded = read_labelled_pairs(written(tmp_path / "pairs.jsonl", rows))
    assert len(frame) == 1
    assert excluded == {"missing_text": 1, "different_prompts": 1, "identical_outputs": 1}


@pytest.mark.parametrize(
    "row, error",
    [
        ({"question": "x"}, "has no chosen and rejected"),
        ({"chosen": LONG, "rejected": SHORT}, "line 1 has no prompt"),
        ({"prompt": 3, "chosen": LONG, "rejected": SHORT}, "neither a text nor a list"),
        (FORMS["texts"] | {"chosen": SHORT}, "has no usable pair"),
    ],
)
def test_broken_data_set_is_a_one_line_error(tmp_path, row, error):
    with pytest.raises(UserError, match=error) as caught:
        read_labelled_pairs(written(tmp_path / "pairs.jsonl", [row]))
    assert "\n" not in str(caught.value)


def evaluate(monkeypatch, *flags: object) -> None:
    import evaluate_ranker

    monkeypatch.setattr(sys, "argv", ["evaluate_ranker.py", *map(str, flags)])
    run(evaluate_ranker.main)


def test_any_model_is_evaluated_by_subset(tmp_path, monkeypatch, capsys):
    """The function prefers the longer answer, so it is right in `easy` and wrong in `hard`."""
    (tmp_path / "mine.py").write_text(
        "def longer(prompt, responses):\n    return [float(len(r)) for r in responses]\n"
    )
    right = FORMS["texts"] | {"subset": "easy"}
    wrong = {"prompt": "Name it.", "chosen": SHORT, "rejected": LONG, "subset": "hard"}
    pairs = written(tmp_path / "pairs.jsonl", [right, right | {"prompt": "Again."}, wrong])
    table = tmp_path / "table.md"
    evaluate(
        monkeypatch, "--model", f"{tmp_path}/mine.py:longer", "--pairs", pairs, "--table", table
    )
    result = json.loads(capsys.readouterr().out)
    assert result["kind"] == "function"
    assert result["n"] == 3
    assert not result["balanced"]
    assert result["agreement"] == round(2 / 3, 4)
    assert result["subsets"]["easy"]["agreement"] == 1
    assert result["subsets"]["hard"]["agreement"] == 0
    assert result["mean_over_subsets"] == 0.5
    assert result["excluded"]["training_instruction"] is None
    assert result["corrupted"] == {}
    assert "| hard | 1 | 0.0 \u00b1 0.0 |" in table.read_text()


@pytest.mark.parametrize(
    "model, error",
    [("mine.py:absent", "mine.py"), ("org/unknown-model", "preference.kind"), ("gpt", "give")],
)
def test_unknown_model_is_a_one_line_error(tmp_path, monkeypatch, capsys, model, error):
    monkeypatch.chdir(tmp_path)
    pairs = written(tmp_path / "pairs.jsonl", [FORMS["texts"]])
    with pytest.raises(SystemExit) as stop:
        evaluate(monkeypatch, "--model", model, "--pairs", pairs)
    printed = capsys.readouterr().err.strip()
    assert stop.value.code == 1
    assert error in printed
    assert len(printed.splitlines()) == 1
