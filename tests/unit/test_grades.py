"""Grades of DNO-Prct: their pairs, loops, judges' scores, and both kinds of judges."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_mt_bench import KEY, server  # noqa: F401, server is a fixture

import build_pairs
import grade_responses
from sppo.core.artifacts import read_json
from sppo.core.errors import UserError
from sppo.core.tables import read_table, write_table
from sppo.evaluation.judges import GRADES
from sppo.preferences.grades import GOLD, far_apart, loops, read_score, rubric

PROMPTS = {"a": "What is tea?", "b": "What is rye?"}
TEXTS = {
    "a": ["A plant and a drink.", "No idea.", "tea is tea is tea is " * 9],
    "b": ["A grain.", "A grain, sown in autumn.", "Rye."],
}


# --- functions ---

PAPER = (5, 2, 1)  # winner_grade, gold_grade_margin, own_grade_margin


@pytest.mark.parametrize(
    ("grades", "thresholds", "pairs"),
    [
        # Gold beats responses that are 2 below it. The policy's responses need a margin of 1.
        ({GOLD: 6, 0: 4, 1: 5}, PAPER, [(GOLD, 0), (1, 0)]),
        # Grade 4 is not a winner, and it is too close to gold.
        ({GOLD: 5, 0: 3, 1: 4, 2: 3.5}, PAPER, [(GOLD, 0)]),
        # The policy's responses beat gold, and equal grades make no pair.
        ({GOLD: 0, 0: 6, 1: 6}, PAPER, [(0, GOLD), (1, GOLD)]),
        # Here they need a margin of 1 to beat gold, where gold would need 2.
        ({GOLD: 4, 0: 6, 1: 5, 2: 3}, PAPER, [(0, GOLD), (0, 1), (0, 2), (1, GOLD), (1, 2)]),
        # No response reaches the winner grade.
        ({GOLD: 4, 0: 4, 1: 0}, PAPER, []),
        # There is no gold response.
        ({0: 6, 1: 5, 2: 4}, PAPER, [(0, 1), (0, 2), (1, 2)]),
        ({GOLD: 3.9, 0: 3.4, 1: 2.5}, (3.6, 1.0, 0.5), [(GOLD, 1)]),
        ({}, PAPER, []),
        ({3: 6}, PAPER, []),
    ],
)
def test_pairs_need_the_grade_margins(grades, thresholds, pairs):
    assert far_apart(grades, *thresholds) == pairs


def test_loop_is_eight_words_repeated_four_times():
    once = "the cat sat on the mat and slept"
    assert loops(" ".join([once] * 4))
    assert not loops(" ".join([once] * 3))
    # The place, the case and the punctuation of the repetitions do not matter.
    assert loops(f"It was so. {once}! One. {once.upper()}, two; {once}\n\nthree {once}")
    # Repetitions may overlap: 11 words contain 4 sequences of 8 words.
    assert loops("no " * 11)
    assert not loops("no " * 10)
    assert not loops("")
    assert not loops("one two three")
    assert not loops("| --- " * 40 + "| a | b |")
    assert not loops(" ".join(f"Step {i}: open the box, take one out, close it." for i in range(3)))


def test_gold_responses_are_not_loops():
    file = Path(__file__).resolve().parents[2] / "data/gold.jsonl"
    for line in file.read_text().splitlines():
        assert not loops(json.loads(line)["response"])


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Relevant and clear.\nScore: 4", 4),
        ("Score: 2 for a start, yet complete.\n\nScore: 5", 5),
        ("**Score: 6**", 6),
        ("**Score:** 3.", 3),
        ("score : 0", 0),
        ("Score: 4.5", 4.5),
        ("Score: 5/6", 5),
        ("Score: 5 / 6.", 5),
        ("Score: 5/10", None),
        ("Score: 7", None),
        ("Score: 45", None),
        ("Score: n", None),
        ("Score: -1", None),
        ("I give it 5 points.", None),
        ("", None),
    ],
)
def test_last_score_of_an_answer_is_read(answer, score):
    assert read_score(answer) == score


def test_rubric_contains_request_and_response_unchanged():
    (asked,) = rubric([{"role": "user", "content": "What is {tea}?"}], "A {plant}.\nScore: 6")
    assert asked["role"] == "user"
    assert "<request>\nWhat is {tea}?\n</request>" in asked["content"]
    assert "<response>\nA {plant}.\nScore: 6\n</response>" in asked["content"]


def test_rubric_contains_all_turns_of_a_chat():
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Tea?"},
    ]
    (asked,) = rubric(chat, "Yes")
    assert "user: Hi\n\nassistant: Hello\n\nuser: Tea?" in asked["content"]


def test_rubric_has_six_criteria():
    (asked,) = rubric([{"role": "user", "content": "Hi"}], "Yes")
    numbers = re.findall(r"^([1-6])\.", asked["content"], re.MULTILINE)
    assert numbers == ["1", "2", "3", "4", "5", "6"]


def keys(judge, model=None, url=None):
    return {"judge": judge, "judge_model": model, "judge_base_url": url}


def test_judge_keys_are_checked_before_any_work(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for judge, model, url, message in (
        ("openai", None, None, "grades.judge_model"),
        ("openai", "m", None, "grades.judge_base_url"),
        ("gpt-4-0613", None, None, "OPENAI_API_KEY.*grades.judge"),
        ("claude", None, None, "unknown judge claude.*grades.judge"),
        ("ranker", None, None, "unknown judge ranker; give preference"),
    ):
        with pytest.raises(UserError, match=message):
            GRADES.check(keys(judge, model, url))
    GRADES.check(keys("preference"))
    GRADES.check(keys("gpt-4-0613"), key=False)


# --- the programs ---


@pytest.fixture
def files(tmp_path):
    write_table(
        tmp_path / "prompts.parquet",
        [
            {
                "prompt_id": i,
                "category": "",
                "messages": [{"role": "user", "content": text}],
                "prompt_token_ids": [1],
                "source": "s",
            }
            for i, text in PROMPTS.items()
        ],
        "prompts",
    )
    write_table(
        tmp_path / "responses.parquet",
        [
            {
                "prompt_id": i,
                "sample_id": k,
                "seed": k,
                "prompt_token_ids": [1],
                "token_ids": [10 + k, 2],
                "text": text,
                "finish_reason": "stop",
            }
            for i in PROMPTS
            for k, text in enumerate(TEXTS[i])
        ],
        "responses",
    )
    (tmp_path / "gold.jsonl").write_text('{"id": "a", "response": "An infusion of leaves."}\n')
    return tmp_path


@pytest.fixture
def grade(program, files):
    def call(*flags):
        program(
            grade_responses,
            "--prompts",
            files / "prompts.parquet",
            "--responses",
            files / "responses.parquet",
            "--gold",
            files / "gold.jsonl",
            "--output",
            files / "grades/0.parquet",
            *flags,
        )
        return {
            (row["prompt_id"], row["sample_id"]): row["grade"]
            for row in read_table(files / "grades/0.parquet", "grades")
        }

    return call


class Longer:
    """A preference model whose logit is a tenth of the difference in characters."""

    name = "longer"

    def all_pair_logits(self, groups):
        for prompt, texts, _ in groups:
            assert prompt in PROMPTS.values()
            lengths = np.array([len(text) for text in texts], dtype=float)
            yield (lengths[:, None] - lengths[None, :]) / 10


def test_preference_model_grade_is_six_times_p_hat(grade, files, monkeypatch):
    monkeypatch.setattr(grade_responses, "load_preference_model", lambda *_: Longer())
    grades = grade()

    def sigma(x):
        return 1 / (1 + np.exp(-x))

    lengths = {k: len(text) for k, text in enumerate(TEXTS["a"])}
    lengths[GOLD] = len("An infusion of leaves.")
    for k in (0, 1, GOLD):
        p_hat = np.mean([sigma((lengths[k] - other) / 10) for other in lengths.values()])
        assert grades["a", k] == pytest.approx(6 * p_hat)
    assert grades["a", 2] == 0  # It is the longest response, but a loop.
    # The mean P-hat of the three responses to prompt b, which has no gold response, is 1/2.
    assert sum(grades["b", k] for k in range(3)) == pytest.approx(9)
    assert len(grades) == 7
    record = read_json(files / "grades/0.parquet.record.json")
    counts = {"graded": 7, "ungraded": 0, "looping": 1, "gold": 1, "grader": "longer"}
    assert {key: record[key] for key in counts} == counts
    assert str(files / "gold.jsonl") in record["inputs"]


@pytest.fixture
def by_api(grade, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return lambda: grade(
        "--judge", "openai", "--judge-model", "judge-1", "--judge-base-url", server.url
    )


def test_api_judge_grades_by_the_rubric(by_api, server, files):
    server.plan = ["Score: 9", *["Fine.\nScore: 5"] * 4, 429, "Score: 2"]
    grades = by_api()

    assert sorted(grades.values()) == [0, 2, 5, 5, 5, 5]
    assert grades["a", 2] == 0
    assert len(server.prompts) == 6  # The loop has grade 0 without a request.
    assert all("Score: n" in prompt[-1]["content"] for prompt in server.prompts)
    record = read_json(files / "grades/0.parquet.record.json")
    counts = {"graded": 6, "ungraded": 1, "looping": 1, "grader": "judge-1"}
    assert {key: record[key] for key in counts} == counts


def test_answer_without_a_score_is_reported_and_retried(by_api, server, files, capfd):
    server.plan = ["I like it.", *["Score: 5"] * 5]
    by_api()
    assert (
        "warning: 1 of 6 answers of the judge judge-1 have no grade, such as 'I like it.'"
        in capfd.readouterr().err
    )
    by_api()
    record = read_json(files / "grades/0.parquet.record.json")
    assert len(server.prompts) == 7
    # The second answer, "Rating: [[7]]", has no score either.
    assert (record["graded"], record["ungraded"]) == (6, 1)


@pytest.mark.parametrize("answer", ["I like it.", ""])
def test_judge_without_any_score_is_quoted_in_the_error(by_api, server, files, answer):
    server.plan = [answer] * 6
    quote = f"'{answer}'" if answer else "an empty answer"
    with pytest.raises(
        UserError, match=f"6 of 6 answers of the judge judge-1 have no grade, such as {quote}"
    ):
        by_api()
    assert not (files / "grades/0.parquet").exists()
    server.plan = ["Score: 4"] * 6
    assert sorted(by_api().values()) == [0, *[4] * 6]


def test_failed_judge_keeps_grades_and_hides_the_key(by_api, server, files):
    server.plan, server.dead_after = ["Score: 4"] * 9, 3
    with pytest.raises(UserError, match="finished judgments are kept") as error:
        by_api()
    assert KEY not in str(error.value)
    assert not (files / "grades/0.parquet").exists()
    server.plan, server.dead_after = ["Score: 4"] * 9, None

    assert sorted(by_api().values()) == [0, *[4] * 6]
    assert len(server.prompts) == 6
    by_api()
    assert len(server.prompts) == 6


def test_missing_gold_file_and_unknown_prompts_are_errors(grade, files):
    (files / "gold.jsonl").unlink()
    with pytest.raises(UserError, match="gold.jsonl is missing"):
        grade()
    (files / "gold.jsonl").write_text("")
    write_table(
        files / "prompts.parquet", read_table(files / "prompts.parquet", "prompts")[:1], "prompts"
    )
    with pytest.raises(UserError, match="answers prompt b"):
        grade()


@pytest.fixture
def build(program, files, tiny_policy):
    """Build pairs from {(prompt, sample): grade}; returns the pairs and their record."""

    def call(grades, *flags):
        write_table(
            files / "grades.parquet",
            [{"prompt_id": i, "sample_id": k, "grade": grade} for (i, k), grade in grades.items()],
            "grades",
        )
        program(
            build_pairs,
            "--construction",
            "graded",
            "--prompts",
            files / "prompts.parquet",
            "--responses",
            files / "responses.parquet",
            "--gold",
            files / "gold.jsonl",
            "--policy",
            tiny_policy,
            "--preferences",
            "--grades",
            files / "grades.parquet",
            "--output",
            files / "pairs.parquet",
            *flags,
        )
        pairs = read_table(files / "pairs.parquet", "pairs")
        return pairs, read_json(files / "pairs.parquet.record.json")

    return call


def test_graded_pairs_have_grades_instead_of_p_hat(build, files):
    # ("b", 2) has no grade.
    pairs, record = build(
        {("a", GOLD): 6, ("a", 0): 5, ("a", 1): 3, ("a", 2): 0, ("b", 0): 4, ("b", 1): 4.5}
    )

    assert [
        (pair["prompt_id"], pair["chosen_sample_id"], pair["rejected_sample_id"]) for pair in pairs
    ] == [("a", -1, 1), ("a", -1, 2), ("a", 0, 1), ("a", 0, 2)]
    assert (pairs[0]["chosen"], pairs[0]["rejected"], pairs[0]["prompt_token_ids"]) == (
        "An infusion of leaves.",
        "No idea.",
        [1],
    )
    assert pairs[0]["chosen_token_ids"][-1] == 2
    assert pairs[0]["rejected_token_ids"] == [11, 2]
    assert pairs[2]["p_hat_chosen"] == 5 / 6
    assert pairs[2]["p_hat_rejected"] == 0.5
    assert pairs[2]["p_chosen_beats_rejected"] == 1
    assert record["dropped"] == {"tie": 0, "identical": 0, "empty": 0, "truncated": 0, "no_pair": 1}
    assert str(files / "grades.parquet") in record["inputs"]


def test_grade_thresholds_can_be_set(build):
    pairs, _ = build({("b", 0): 4, ("b", 1): 3}, "--winner-grade", 4, "--own-grade-margin", 0.5)
    assert len(pairs) == 1


def test_graded_pairs_are_replayed(build, files):
    first, _ = build({("a", GOLD): 6, ("a", 0): 5, ("a", 1): 3, ("a", 2): 0})
    for name in ("pairs.parquet", "pairs.parquet.record.json"):
        (files / name).rename(files / name.replace("pairs", "before"))
    pairs, record = build(
        {("b", 0): 6, ("b", 1): 3}, "--previous", files / "before.parquet", "--replay-share", 0.3
    )
    assert record["replayed"] == 1
    assert pairs[0]["prompt_id"] == "b"
    assert pairs[1]["chosen"] in {pair["chosen"] for pair in first}


def test_grades_that_do_not_match_responses_are_errors(build, program, files):
    with pytest.raises(UserError, match="grades response 7 to prompt a"):
        build({("a", 7): 5})
    with pytest.raises(UserError, match="grades response -1 to prompt b"):
        build({("b", GOLD): 5})
    with pytest.raises(UserError, match="needs a shard of --grades"):
        program(
            build_pairs,
            "--construction",
            "graded",
            "--prompts",
            files / "prompts.parquet",
            "--responses",
            files / "responses.parquet",
            "--output",
            files / "pairs.parquet",
        )
