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
import hashlib
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sppo.core.artifacts import file_hash, json_lines, known_hash, parse_json
from sppo.core.errors import UserError
from sppo.core.openai_api import (
    NO_COMPLETION,
    OPENAI_MODELS,
    check_address,
    judge_failure,
    quoted,
    request_forms,
)
from sppo.preferences.adapters import EMBEDDED, adapter_folder

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

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
CONCURRENT = 4  # requests to a server at once
TIMEOUT = 120  # seconds for one judgment
RETRIES = 6  # of the openai package, with exponential backoff
# Largest share of answers without a grade: with more the mean of the others tells too little.
UNREADABLE = 0.2


def check_judge(
    judge: str,
    judge_model: str | None,
    judge_base_url: str | None,
    key: bool = True,
    section: str = "mt_bench",
) -> None:
    """Raise UserError if the judge of a configuration section cannot work: missing folder, model, address or, if `key`, key. Cheap."""
    if judge_base_url is not None:  # also where no server is asked: records hold it
        check_address(judge_base_url, f"{section}.judge_base_url")
    folder = adapter_folder(judge)
    if folder:
        if not folder.is_dir():
            raise UserError(
                f"judge {judge}: the folder {folder} is missing; train the adapter or correct {section}.judge"
            )
    elif judge == "openai":
        for setting, value in (("judge_model", judge_model), ("judge_base_url", judge_base_url)):
            if not value:
                raise UserError(f"judge openai needs {section}.{setting}; set it")
    elif not judge.startswith(OPENAI_MODELS):
        raise UserError(
            f"unknown judge {judge}; take {', '.join(EMBEDDED)}, a folder of such an adapter, openai, or a model of "
            f"OpenAI's such as gpt-6-luna as {section}.judge"
        )
    elif key and not os.environ.get("OPENAI_API_KEY"):
        raise UserError(
            f"judge {judge} needs a key; export OPENAI_API_KEY, or choose another {section}.judge"
        )


def check_grader(
    judge: str, judge_model: str | None, judge_base_url: str | None, key: bool = True
) -> None:
    """The same for the section `grades`, whose judge grades one response alone: the run's preference model or one behind an API."""
    if judge == "preference":
        if judge_base_url is not None:
            check_address(judge_base_url, "grades.judge_base_url")
        return
    if judge != "openai" and not judge.startswith(OPENAI_MODELS):
        raise UserError(
            f"unknown judge {judge}; take preference (the run's preference model), openai, or a model of OpenAI's such as gpt-6-luna "
            "as grades.judge"
        )
    check_judge(judge, judge_model, judge_base_url, key, section="grades")


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


def concurrently(ask: Callable[[Any], Any], items: list[Any], what: str) -> list[Any]:
    """`ask` of every item, some at once; the first error stops what has not begun."""
    from sppo.core.progress import progress

    with ThreadPoolExecutor(CONCURRENT) as executor:
        futures = [executor.submit(ask, item) for item in items]
        try:
            return [future.result() for future in progress(futures, what)]
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


class Client:
    """A judge behind an OpenAI-compatible server; called, it has the signature of FastChat's chat_completion_openai.

    Finished judgments are kept in `cache` by model, server and the whole prompt, so that a run goes on where it
    stopped and nothing old is used for another judge, prompt or answer. 429, time-outs and failures of the server
    are tried again with backoff by the openai package; what still fails is a UserError.

    An answer that is not `readable` is not kept, so that a repaired judge is asked again;
    `unreadable` holds those of this run.
    """

    def __init__(
        self, model: str, base_url: str | None, cache: Path, readable: Callable[[str], bool]
    ) -> None:
        import openai

        key = os.environ.get("OPENAI_API_KEY") or (
            "EMPTY" if base_url else None
        )  # a local server wants none, the package does
        self.api = openai.OpenAI(
            base_url=base_url, api_key=key, timeout=TIMEOUT, max_retries=RETRIES
        )
        self.model, self.base_url, self.cache, self.lock = model, base_url, cache, threading.Lock()
        self.form = 0  # of `request_forms`, the one that the server takes
        self.readable = readable
        self.unreadable: list[str] = []
        # Older code kept the others too.
        self.kept = {key: answer for key, answer in _kept(cache) if readable(answer)}

    def __call__(self, model: str, conversation: Any, temperature: float, max_tokens: int) -> str:
        answer = self.ask(conversation.to_openai_api_messages(), temperature, max_tokens)
        # FastChat must find no rating where we find none.
        return answer if self.readable(answer) else answer.replace("[", "(")

    def ask(self, messages: list[dict[str, str]], temperature: float, max_tokens: int) -> str:
        """The judge's answer to the messages, kept or new."""
        import openai

        question = json.dumps([self.model, self.base_url, temperature, max_tokens, messages])
        key = hashlib.sha256(question.encode()).hexdigest()
        if key not in self.kept:
            try:
                text = self._answer(messages, request_forms(max_tokens, temperature=temperature))
            except (openai.OpenAIError, *NO_COMPLETION) as error:
                raise judge_failure(
                    self.base_url or self.model, error, self.api.api_key, self.cache
                ) from None
            if not self.readable(text):
                self.unreadable.append(text)
                return text
            with self.lock:
                self.kept[key] = text
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                with self.cache.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps([key, self.kept[key]]) + "\n")
        return self.kept[key]

    def check_unreadable(self, asked: int) -> None:
        """Say how many of the `asked` answers have no grade, quoting one.

        UserError if they are a larger share than `UNREADABLE`.
        """
        failed = len(self.unreadable)
        if not failed:
            return
        said = (
            f"{failed} of {asked} answers of the judge {self.model} have no grade, such as "
            f"{quoted(self.unreadable[0])}"
        )
        if failed > UNREADABLE * asked:
            raise UserError(
                f"{said}; at most {UNREADABLE:.0%} may have none; fix the judge or "
                "name another and run again, the other judgments are kept in "
                f"{self.cache}"
            )
        print(f"warning: {said}; they are left out and counted", file=sys.stderr, flush=True)

    def _answer(self, messages: list[dict[str, str]], forms: list[dict[str, Any]]) -> str:
        """The server's answer in the first form of the request that it takes, from now on the only one."""
        import openai

        form = self.form
        while True:
            try:
                answer = self.api.chat.completions.create(
                    model=self.model,
                    messages=cast("list[ChatCompletionMessageParam]", messages),
                    **forms[form],
                )
                self.form = form
                return answer.choices[0].message.content or ""
            except openai.BadRequestError as error:
                if form + 1 == len(forms) or error.code not in (
                    "unsupported_parameter",
                    "unsupported_value",
                ):
                    raise
                form += 1


def _kept(cache: Path) -> Iterator[tuple[str, str]]:
    for line in cache.read_bytes().split(b"\n") if cache.is_file() else []:
        with contextlib.suppress(ValueError, TypeError):  # a kill may tear the last line
            key, answer = parse_json(line)
            yield key, answer


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
