"""Where a win rate comes from: its parts add up to it, and rules make the answers they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import explain_win_rate
from sppo.core.errors import UserError
from sppo.preferences.base import settings_for
from sppo.preferences.constraints import read_instructions_to_check
from sppo.preferences.verifiable import VerifiableModel

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = ROOT / "data/instructions/sentence_held_out.jsonl"


@pytest.fixture
def results(tmp_path):
    """An experiment of three instructions, where the policy and the base differ in two."""
    prompts = [each.prompt for each in read_instructions_to_check(HELD_OUT)[:3]]
    answers = {
        "iter0/reference_outputs.json": ["I sing, and sing, and sing with friends."] * 3,
        "iter1/alpaca_eval_outputs.json": ["We sing to plan it.", "A plan", "I sing."],
        "dpo/iter1/alpaca_eval_outputs.json": ["I sing, and sing, and sing with friends."] * 3,
    }
    for name, texts in answers.items():
        rows = [
            {"instruction": prompt, "output": text, "generator": name}
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(rows))
    other = [{"instruction": "Another one.", "output": "Yes.", "generator": "other"}]
    (tmp_path / "other/iter1").mkdir(parents=True)
    (tmp_path / "other/iter1/alpaca_eval_outputs.json").write_text(json.dumps(other))
    return tmp_path


def table(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 1}


def test_parts_add_up_to_the_judges_win_rate(results, program, capsys):
    program(explain_win_rate, "--results", results)
    found = table(capsys.readouterr().out)
    assert "other/iter1" not in found
    assert set(found["dpo/iter1"][1:-1]) == {"+0.0"} and found["dpo/iter1"][0] == "50.0"
    won, *parts, _ = map(float, found["iter1"])
    assert 50 + sum(parts) == pytest.approx(won, abs=0.2)
    model = VerifiableModel(settings_for("verifiable"), None, "cpu")
    answers, base = (
        {row["instruction"]: row["output"] for row in json.loads((results / name).read_text())}
        for name in ("iter1/alpaca_eval_outputs.json", "iter0/reference_outputs.json")
    )
    P = [
        model.probabilities(model.instructions[prompt], [answers[prompt], base[prompt]])[0, 1]
        for prompt in base
    ]
    assert won == pytest.approx(100 * sum(P) / 3, abs=0.05)


def test_required_words_follow_all_constraints(results, program, capsys):
    program(explain_win_rate, "--results", results)
    found = table(capsys.readouterr().out)
    assert found["only the required words"][-1] == "100"


def test_base_answer_is_cut_before_the_limit():
    instruction = read_instructions_to_check(HELD_OUT)[0]  # less than 15 words
    text = "one, two, three four five six seven eight nine ten eleven twelve 13 14 15 16"
    cut = explain_win_rate.shortened(instruction, text)
    assert cut.startswith("one two three") and cut.endswith("13 14.")


def test_unfinished_experiment_and_other_annotators_are_refused(tmp_path, results, program):
    with pytest.raises(UserError, match="run make demo"):
        program(explain_win_rate, "--results", tmp_path / "none")
    rows = [{"instruction": "Unknown.", "output": "A.", "generator": "base"}]
    (results / "iter0/reference_outputs.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="knows no constraints of 'Unknown.'"):
        program(explain_win_rate, "--results", results)
