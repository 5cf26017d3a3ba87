"""Whether OpenAI still has a judge's model, asked of a server that answers with the status that the test wants."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sppo import api
from sppo.errors import UserError


@pytest.fixture
def openai(monkeypatch):
    """A server in OpenAI's place: `status` is what it answers, `asked` what it was asked with which key."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append((self.path, self.headers["Authorization"]))
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.status, server.asked = 200, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-key")
    monkeypatch.setattr(api, "OPENAI", f"http://127.0.0.1:{server.server_port}/v1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("judge", "model"), [
    (("weighted_alpaca_eval_gpt4_turbo", None, None), "gpt-4-1106-preview"), (("gpt-4", None, None), "gpt-4"), (("openai", "o9", "{OPENAI}"), "o9")])
def test_a_model_of_openai_is_asked_for(openai, judge, model):
    judge = [word and word.format(OPENAI=api.OPENAI) for word in judge]
    api.check_served(*judge, "mt_bench")
    assert openai.asked == [(f"/v1/models/{model}", "Bearer sk-key")]

    openai.status = 404
    with pytest.raises(UserError, match=f"mt_bench.judge is {judge[0]}, but OpenAI has no {model} .*name another") as caught:
        api.check_served(*judge, "mt_bench")
    assert "\n" not in str(caught.value)
    openai.status = 401
    with pytest.raises(UserError, match="OpenAI refuses the key") as caught:
        api.check_served(*judge, "mt_bench")
    assert "sk-key" not in str(caught.value)


def test_a_server_that_fails_or_does_not_answer_says_nothing(openai, monkeypatch):
    for openai.status in (403, 429, 500):
        api.check_served("gpt-4", None, None, "mt_bench")
    monkeypatch.setattr(api, "OPENAI", "http://127.0.0.1:9/v1")
    api.check_served("gpt-4", None, None, "mt_bench")


def test_who_is_not_openai_s_is_not_asked_for(openai, monkeypatch):
    for judge in (("judge", None, None), ("preference", None, None), ("openai", "mine", "http://localhost:8000/v1"), ("some_annotators_config", None, None)):
        api.check_served(*judge, "alpaca_eval")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    api.check_served("gpt-4", None, None, "mt_bench")
    assert openai.asked == []


def test_openai_s_own_address_needs_a_key(openai, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="export OPENAI_API_KEY, or choose another alpaca_eval.judge"):
        api.check_served("openai", "o9", api.OPENAI, "alpaca_eval")
