"""A preference model behind an HTTP address: what is asked, what is accepted, what is an error."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from sppo.core.errors import UserError
from sppo.preferences import http
from sppo.preferences.base import Group, compare, find_kind, load_preference_model, settings_for
from sppo.preferences.estimates import win_probabilities
from sppo.preferences.http import HttpModel

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi?"}]
GROUPS = {
    "p1": Group("Hi?", ["a", "bbb", "cc"], CHAT),
    "p2": Group("Count.", ["one", "two three"]),
}


class Server:
    """A server on this machine that answers with `reply(question)`: status and JSON or bytes."""

    def __init__(self, reply: Callable) -> None:
        self.questions: list[dict] = []
        self.most_at_once = 0
        at_once = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                nonlocal at_once
                with lock:
                    at_once += 1
                    server.most_at_once = max(server.most_at_once, at_once)
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.questions.append(question)
                status, answer = reply(question)
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                with lock:
                    at_once -= 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.httpd.server_port}/compare"
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    """Start a server; a function from a reply to it. Repetitions do not wait."""
    monkeypatch.setattr(http, "WAITS", (0.0, 0.0, 0.0))
    servers = []

    def start(reply: Callable) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.httpd.shutdown()
        server.httpd.server_close()


def model(address: str, **settings: object) -> HttpModel:
    return load_preference_model(settings_for(address, **settings))


def by_length(question: dict) -> tuple[int, dict]:
    return 200, {"scores": [len(text) for text in question["responses"]]}


def test_scores_become_differences_and_the_chat_is_sent(serve):
    server = serve(by_length)
    logits = compare(model(server.address, concurrency=1), GROUPS)
    np.testing.assert_allclose(logits["p1"], [[0, -2, -1], [2, 0, 1], [1, -1, 0]], atol=1e-6)
    np.testing.assert_allclose(logits["p2"][0, 1], 3 - 9, atol=1e-6)
    assert server.questions == [
        {"prompt": "Hi?", "messages": CHAT, "responses": ["a", "bbb", "cc"]},
        {
            "prompt": "Count.",
            "messages": [{"role": "user", "content": "Count."}],
            "responses": ["one", "two three"],
        },
    ]


def test_probabilities_are_used_as_they_are(serve):
    cycle = [[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]]
    server = serve(lambda _: (200, {"probabilities": cycle}))
    logits = compare(model(server.address), {"p1": GROUPS["p1"]})["p1"]
    np.testing.assert_allclose(win_probabilities(logits), cycle, atol=1e-9)


def test_asymmetric_probabilities_are_averaged_with_a_warning(serve, capsys):
    server = serve(lambda _: (200, {"probabilities": [[0.5, 0.9], [0.3, 0.5]]}))
    logits = model(server.address).pair_logits("Hi", ["a", "b"])
    np.testing.assert_allclose(win_probabilities(logits)[0, 1], 0.8)
    assert "is not symmetric for 1 of 1 prompts" in capsys.readouterr().err


def test_answers_keep_the_order_of_the_prompts(serve):
    server = serve(by_length)
    groups = {str(n): Group("p", ["a", "b" * n]) for n in range(1, 19)}
    logits = compare(model(server.address, concurrency=8), groups)
    assert [round(logits[str(n)][1, 0]) for n in range(1, 19)] == list(range(18))


def test_requests_in_flight_are_bounded(serve):
    together = threading.Barrier(3)

    def wait_for_three(question: dict) -> tuple[int, dict]:
        together.wait(timeout=20)
        return by_length(question)

    server = serve(wait_for_three)
    compare(model(server.address, concurrency=3), {str(n): GROUPS["p2"] for n in range(9)})
    assert server.most_at_once == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status, serve):
    answers = iter([(status, b"busy"), (status, b"busy")])
    server = serve(lambda question: next(answers, None) or by_length(question))
    logits = model(server.address).pair_logits("Hi", ["a", "bb"])
    assert logits[1, 0] == pytest.approx(1)
    assert len(server.questions) == 3


@pytest.mark.parametrize(
    ("reply", "said", "asked"),
    [
        ((500, b"out of\nmemory"), "failed: status 500 (out of memory); start or correct", 4),
        ((404, b""), "failed: status 404 (Not Found); start or correct", 1),
        ((200, b"<html>"), "prompt p2: the server's answer is not JSON", 1),
        ((200, [1, 2]), "prompt p2: the server's answer is not a JSON object", 1),
        ((200, {"score": [1, 2]}), "prompt p2: the server's answer has the keys ['score']", 1),
        ((200, {"scores": [1]}), "prompt p2: the server returned shape (1,); return (2,) sco", 1),
        ((200, {"scores": ["a", "b"]}), "prompt p2: the server returned list, which is no", 1),
        ((200, {"scores": [1, None]}), "prompt p2: the server returned NaN or infinity", 1),
        (
            (200, {"probabilities": [[0.5, 2], [0, 0.5]]}),
            "prompt p2: the server returned 0 to 2, which are no probabilities",
            1,
        ),
        ((200, {"probabilities": [0.5, 0.5]}), "returned shape (2,); return (2, 2) prob", 1),
    ],
)
def test_wrong_answers_are_one_line(reply, said, asked, serve):
    server = serve(lambda _: reply)
    with pytest.raises(UserError) as caught:
        compare(model(server.address), {"p2": GROUPS["p2"]})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(server.questions) == asked


def test_an_answer_that_breaks_off_is_one_line(serve):
    class Short(bytes):
        def __len__(self) -> int:
            return 1000  # more than is sent

    server = serve(lambda _: (200, Short(b'{"scores"')))
    with pytest.raises(UserError, match="failed: IncompleteRead.*; start or correct the server"):
        model(server.address).pair_logits("Hi", ["a", "b"])
    assert len(server.questions) == 4


def test_no_server_and_no_answer_in_time_are_one_line(serve):
    silent = threading.Event()
    server = serve(lambda question: silent.wait(20) and by_length(question))
    try:
        with pytest.raises(UserError, match="failed: .*timed out"):
            model(server.address, timeout=0.05).pair_logits("Hi", ["a", "b"])
    finally:
        silent.set()
    server.httpd.server_close()
    with pytest.raises(UserError, match=r"failed: .*refused.*; start or correct the server"):
        model("http://127.0.0.1:9/compare").pair_logits("Hi", ["a", "b"])


def test_an_address_is_checked_before_the_first_job():
    for address, said in (
        ("http://me:secret@host/x", "contains a name or password"),
        ("http://", "is not the address of a server"),
    ):
        settings = settings_for(address)
        assert find_kind(settings) is HttpModel
        with pytest.raises(UserError, match=said) as caught:
            HttpModel.check(settings, "config: preference.model")
        assert "secret" not in str(caught.value)
