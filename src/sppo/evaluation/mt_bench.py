"""MT-Bench (arXiv 2306.05685): questions, grades, scores.

FastChat's own functions load the questions, make the judge's prompts and read its grades. What is ours:
1. answers come from our engines: FastChat's generator knows neither today's chat templates nor a CPU.
2. the client: FastChat calls an interface of openai that is gone. Ours keeps every finished judgment.
3. the offline stand-in: no model that fits a laptop grades an answer well, so the embedded preference model
   compares it with the base policy's, and the grade is that probability on MT-Bench's scale.
"""

from __future__ import annotations

import ast
import contextlib
import io
from pathlib import Path
from typing import Any

from sppo.core.artifacts import file_hash, json_lines, known_hash
from sppo.core.errors import UserError
from sppo.evaluation.judges import Client, concurrently
from sppo.policies.prompts import normalised

Row = dict[str, Any]
# FastChat's data at v0.2.36, from which the wheel 0.2.36 was made: path in its repository and sha256.
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
# FastChat's temperature_config, for answers; copied because the core environment has no FastChat, and tested against it.
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
    """JSON lines with a question_id each. A broken line, a missing and a repeated id are a UserError that names the line."""
    if not path.is_file():
        raise UserError(f"{path} is missing; mt_bench.data needs {', '.join(OFFICIAL)}")
    rows: dict[Any, Row] = {}
    for number, row in enumerate(json_lines(path), start=1):
        if not isinstance(row, dict) or not isinstance(row.get("question_id"), (int, str)):
            raise UserError(f"{path}, line {number} is no JSON object with a question_id; fix it")
        question = row["question_id"]
        if question in rows:
            raise UserError(f"{path}, line {number}: question {question} stands twice; drop one")
        rows[question] = row
    return list(rows.values())


def read_questions(data: Path) -> list[Row]:
    """The questions of two turns. An unknown category is a UserError: its temperature is not known."""
    rows = read_lines(data / "question.jsonl")
    for row in rows:
        turns = row.get("turns")
        two = isinstance(turns, list) and [type(turn) for turn in turns] == [str, str]
        if not two or row.get("category") not in TEMPERATURES:
            raise UserError(
                f"{data}/question.jsonl: question {row['question_id']} needs two turns and a category of "
                f"{', '.join(TEMPERATURES)}; fix it"
            )
    if not rows:
        raise UserError(f"{data}/question.jsonl has no questions; add some")
    return rows


def read_answers(path: Path, questions: list[Row]) -> dict[Any, Row]:
    """Answers in FastChat's form by question_id. UserError unless there is exactly one to each
    question, and if their record does not describe them."""
    if path.is_file():
        known_hash(path)
    answers = {row["question_id"]: row for row in read_lines(path)}
    for row in questions:
        if row["question_id"] not in answers:
            raise UserError(
                f"{path} has no answer to question {row['question_id']}; delete it and make it again"
            )
    if len(answers) > len(questions):
        raise UserError(
            f"{path} answers questions that are not in mt_bench.data; delete it and make it again"
        )
    return answers


def is_official(data: Path, name: str) -> bool:
    """Whether a file of the data folder is FastChat's own, byte for byte."""
    return (data / name).is_file() and file_hash(data / name) == OFFICIAL[name][1]


def grade_locally(
    questions: list[Row], answers: dict[Any, Row], reference: dict[Any, Row], model: Any, judge: str
) -> list[Row]:
    """Grades of an embedded preference model: P(answer beats the reference's answer) from 0 to 1, put on the scale 1 to 10.

    In the second turn it reads both questions as the instruction and compares the second answers.
    """
    from sppo.core.progress import progress
    from sppo.preferences.estimates import win_probabilities

    rows = []
    for question in progress(questions, "judged questions"):
        mine, theirs = (found[question["question_id"]] for found in (answers, reference))
        for turn in (1, 2):
            asked = "\n\n".join(question["turns"][:turn])
            texts = [row["choices"][0]["turns"][turn - 1] for row in (theirs, mine)]
            probability = (
                0.5
                if texts[0] == texts[1]
                else float(win_probabilities(model.pair_logits(asked, texts))[1, 0])
            )
            rows.append(
                {
                    "question_id": question["question_id"],
                    "model": mine["model_id"],
                    "judge": [judge, "compared with the base"],
                    "turn": turn,
                    "win_probability": probability,
                    "score": 1 + 9 * probability,
                }
            )
    return rows


def grade_by_api(
    questions: list[Row], answers: dict[Any, Row], data: Path, client: Client
) -> list[Row]:
    """FastChat's single-answer grading by an API judge: one row a question and turn, score -1 where it gave no grade."""
    from fastchat.conversation import get_conv_template
    from fastchat.llm_judge import common, gen_judgment

    prompts = common.load_judge_prompts(str(data / "judge_prompts.jsonl"))
    found = sorted(data.glob("reference_answer*.jsonl"))
    references = {row["question_id"]: row for row in read_lines(found[0])} if found else {}
    for question in questions:
        if (
            question["category"] in common.NEED_REF_CATS
            and question["question_id"] not in references
        ):
            raise UserError(
                f"{data} has no reference answer to question {question['question_id']} ({question['category']}); add it to "
                "reference_answer.jsonl"
            )
    judges, model = (
        gen_judgment.make_judge_single(client.model, prompts),
        next(iter(answers.values()))["model_id"],
    )
    matches = []
    for name, turns in (("", False), ("-mt", True)):
        for judge, guided in (("default", False), ("math", True)):
            chosen = [
                row for row in questions if (row["category"] in common.NEED_REF_CATS) == guided
            ]
            matches += gen_judgment.make_match_single(
                chosen,
                [model],
                {model: answers},
                judges[judge + name],
                multi_turn=turns,
                ref_answers={client.model: references} if guided else None,
            )
    common.chat_completion_openai = client
    common.get_conversation_template = lambda _: get_conv_template("chatgpt")
    common.OPENAI_MODEL_LIST = (client.model,)
    with contextlib.redirect_stdout(io.StringIO()):  # FastChat prints a line for each
        rows = concurrently(
            lambda match: common.play_a_match_single(match, None), matches, "judged answers"
        )
    client.check_unreadable(len(matches))
    return rows


def rating_is_readable(answer: str) -> bool:
    """Whether FastChat finds a rating in the judge's answer."""
    from fastchat.llm_judge import common

    patterns = (common.one_score_pattern, common.one_score_pattern_backup)
    found = next((match for match in (each.search(answer) for each in patterns) if match), None)
    try:
        return found is not None and ast.literal_eval(found[1]) is not None
    except SyntaxError:  # FastChat reads numbers as Python writes them, and stumbles over 07
        return False


def scores(rows: list[Row], categories: dict[Any, str]) -> Row:
    """FastChat's figures (show_result): means over all rows but failures (-1), which are counted; by turn and category.

    The standard error is over questions, whose two turns hang together; None with fewer than two.
    """
    import numpy as np

    def mean(values: list[float]) -> float | None:
        return float(np.mean(values)) if values else None

    graded = [row for row in rows if row["score"] != -1]
    by_question: dict[Any, list[float]] = {}
    for row in graded:
        by_question.setdefault(row["question_id"], []).append(row["score"])
    means = [np.mean(values) for values in by_question.values()]
    return {
        "average": mean([row["score"] for row in graded]),
        "standard_error": float(np.std(means, ddof=1) / np.sqrt(len(means)))
        if len(means) > 1
        else None,
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
    """Per cent won against the base, by turn, from the rows of `grade_locally`."""
    import numpy as np

    def percent(turn: int) -> float:
        return 100 * float(np.mean([row["win_probability"] for row in rows if row["turn"] == turn]))

    pairs = np.array([row["win_probability"] for row in rows]).reshape(-1, 2).mean(axis=1)
    error = 100 * float(np.std(pairs, ddof=1) / np.sqrt(len(pairs))) if len(pairs) > 1 else None
    return {
        "win_rate": 100 * float(pairs.mean()),
        "standard_error": error,
        "first_turn": percent(1),
        "second_turn": percent(2),
    }


def check_inputs(config: Row, where: str) -> set[str]:
    """The questions can be read; else UserError. Returns first questions, normalised: not trained on.

    config: of the run. where: what stands before a key's name, such as "runs.dpo.".
    """
    data = config["mt_bench"]["data"]
    if data == "fastchat":  # a rule fetches them
        return set()
    return {normalised(row["turns"][0]) for row in read_questions(Path(data))}


def differences(found: Row) -> list[str]:
    """What differs from the setup of the published figures, for the tables."""
    reasons = []
    if not found.get("comparable_with_published"):
        judge = found.get("judge_details", {}).get("model") or found.get("judge")
        reasons.append(f"judged by {judge}")
    if not found.get("official_questions"):
        reasons.append("other questions")
    return reasons
