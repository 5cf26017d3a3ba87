"""A chat model as preference model: its questions, its verdicts, what is kept, and its errors."""

from __future__ import annotations

import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from preference_groups import CHAT

from sppo.core import chat_client
from sppo.core.errors import UserError
from sppo.preferences.base import Group, compare, find_kind, load_preference_model, settings_for
from sppo.preferences.estimates import win_probabilities
from sppo.preferences.llm_judge import CERTAIN, LlmJudge

GROUPS = {
    "p1": Group("Say hi.", ["hi", "hello there", "hi"]),
    "p2": Group("Which colour has it?", ["Brown.", "It {response_a} depends."], CHAT),
}
PARTS = re.compile(
    r"<request>\n(.*)\n</request>.*<response_a>\n(.*)\n</response_a>.*<response_b>\n(.*)\n</respo",
    re.DOTALL,
)


class Server(ThreadingHTTPServer):
    """A judge that likes long responses, and the first one by 0.5 nats more.

    `logprobs`: whether it returns them. `letters`: the probability of A and B together.
    `refuses_logprobs`: with status 400. `says`: its answer to every question, instead; `silent_on`:
    a first response to which it says nothing. `status`: of every answer, if it is not 200.
    """

    logprobs = True
    refuses_logprobs = False
    says: str | None = None
    silent_on: str | None = None
    letters = 0.9
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.status != 200:
            return self.reply(self.server.status, {"error": {"message": "no"}})
        if self.server.refuses_logprobs and "logprobs" in request:
            return self.reply(400, {"error": {"message": "logprobs are not supported"}})
        (message,) = request["messages"]
        _, a, b = parts = PARTS.search(message["content"]).groups()
        self.server.asked.append(parts)
        margin = 0.1 * (len(a) - len(b)) + 0.5
        text = self.server.says or ("A" if margin > 0 else "B")
        if a == self.server.silent_on:
            text = "Hm."
        choice: dict = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text},
        }
        if self.server.logprobs and request.get("logprobs"):
            top = [
                {"token": token, "logprob": logp, "bytes": None}
                for token, logp in (
                    ("A", math.log(self.server.letters / (1 + math.exp(-margin)))),
                    (" B", math.log(self.server.letters / (1 + math.exp(margin)))),
                    ("The", math.log(1 - self.server.letters)),
                    ("a", -9.0),
                )
            ]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}], "refusal": None}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"]}
        self.reply(200, body | {"choices": [choice]})

    def reply(self, status: int, body: dict) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # finished comparisons are kept below it
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(chat_client, "RETRIES", 0)
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def judge(server: Server, **settings: object) -> LlmJudge:
    return load_preference_model(settings_for("openai:judge-1", base_url=server.url, **settings))


def test_logits_are_differences_of_log_probabilities(server):
    logits = compare(judge(server), GROUPS)["p1"]
    gap = 0.1 * (len("hello there") - len("hi"))
    assert logits[1, 0] == pytest.approx(gap + 0.5)
    assert logits[0, 1] == pytest.approx(-gap + 0.5)
    assert logits[0, 2] == logits[2, 0] == 0
    P = win_probabilities(logits)
    assert P[1, 0] == pytest.approx(1 / (1 + math.exp(-gap)))  # The position's bias cancels.


def test_questions_have_the_chat_and_both_orders_once(server):
    compare(judge(server, concurrency=1), GROUPS)
    chat = "user: What is tea?\n\nassistant: A drink.\n\nuser: Which colour has it?"
    assert server.asked == [
        ("Say hi.", "hi", "hello there"),
        ("Say hi.", "hello there", "hi"),
        (chat, "Brown.", "It {response_a} depends."),
        (chat, "It {response_a} depends.", "Brown."),
    ]


@pytest.mark.parametrize("refuses", [True, False])
def test_without_log_probabilities_letters_count(refuses, server):
    server.logprobs, server.refuses_logprobs = False, refuses
    logits = compare(judge(server), GROUPS)["p1"]
    assert logits[1, 0] == CERTAIN
    assert logits[0, 1] == -CERTAIN
    server.says = "A"  # to both orders
    P = win_probabilities(judge(server).pair_logits("New?", ["a", "b"]))
    assert P[0, 1] == 0.5


def test_improbable_letters_are_no_verdict(server):
    """As of a model that thinks first, whose first token is nearly always <think>."""
    server.letters, server.says = 1e-5, "<think>"
    with pytest.raises(
        UserError, match="answers of the judge judge-1 have no grade, such as .*think"
    ):
        compare(judge(server), GROUPS)


def test_a_pair_with_one_missing_verdict_is_a_tie(server, capsys):
    """The verdict on the other order alone has the judge's position bias."""
    server.logprobs, server.silent_on = False, "f"
    responses = ["a", "b" * 12, "c" * 24, "d" * 36, "f"]
    P = win_probabilities(judge(server).pair_logits("Say hi.", responses))
    assert P[4].tolist() == [0.5] * 5
    assert P[3, 0] > 0.9
    assert "4 of 20 answers" in (said := capsys.readouterr().err)
    assert "their comparisons count as ties" in said


def test_finished_comparisons_are_kept_and_announced(server, capsys):
    first = compare(judge(server), GROUPS)
    said = capsys.readouterr().err
    assert re.search(r"openai:judge-1: 4 comparisons, about [\d,]+ tokens to read", said)
    assert len(server.asked) == 4
    again = compare(judge(server), GROUPS)
    assert len(server.asked) == 4
    for name in GROUPS:
        np.testing.assert_array_equal(first[name], again[name])
    load_preference_model(settings_for("openai:judge-2", base_url=server.url)).pair_logits(
        "Say hi.", ["hi", "hello there"]
    )
    assert len(server.asked) == 6, "another judge must be asked"


def test_a_stopped_run_continues(server):
    server.status = 401
    with pytest.raises(UserError, match=r"judge http.*no.*finished judgments are kept in \.cache"):
        compare(judge(server), GROUPS)
    server.status = 200
    judge(server).all_pair_logits([GROUPS["p1"]])
    compare(judge(server), GROUPS)
    assert len(server.asked) == 4


def test_answers_without_a_letter_stop_the_stage(server):
    server.logprobs, server.says = False, "Neither, really."
    with pytest.raises(UserError, match="4 of 4 answers of the judge judge-1 have no grade"):
        compare(judge(server), GROUPS)


def test_the_question_can_be_replaced(server, tmp_path):
    file = tmp_path / "question.txt"
    file.write_text(
        "Which?\n<request>\n{prompt}\n</request><response_a>\n{response_b}\n</response_a>"
        "<response_b>\n{response_a}\n</response_b>"
    )
    judge(server, prompt_template=str(file), concurrency=1).pair_logits("Hi?", ["a", "bb"])
    assert server.asked[0] == ("Hi?", "bb", "a")
    file.write_text("{prompt} {response_a}")
    with pytest.raises(UserError, match=r"question\.txt has no \{response_b\}; add it"):
        judge(server, prompt_template=str(file))
    with pytest.raises(UserError, match=r"missing\.txt cannot be read"):
        judge(server, prompt_template="missing.txt")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (None, "needs a key; export OPENAI_API_KEY, or set preference.base_url"),
        ("localhost:8000", "is not the address of a server"),
    ],
)
def test_a_judge_is_checked_before_the_first_job(address, said, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    settings = settings_for("openai:judge-1", base_url=address)
    assert find_kind(settings) is LlmJudge
    with pytest.raises(UserError, match=said):
        LlmJudge.check(settings, "config: preference.model")
