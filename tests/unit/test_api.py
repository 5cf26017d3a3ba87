"""Addresses of judges, and the check that OpenAI still has a model, with a local server."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sppo.core import openai_api
from sppo.core.errors import UserError
from sppo.evaluation import judges


def chosen(judge: str, url: str | None = None, model: str | None = "m") -> dict:
    """The keys of a section that select a judge."""
    return {"judge": judge, "judge_model": model, "judge_base_url": url}


@pytest.fixture
def openai(monkeypatch):
    """A server that replaces OpenAI.

    `status` is the status of its answers. `asked` has the path and the key of each request.
    """

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
    monkeypatch.setattr(openai_api, "OPENAI", f"http://127.0.0.1:{server.server_port}/v1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("judge", "model"),
    [
        (("weighted_alpaca_eval_gpt4_turbo", None, None), "gpt-4-1106-preview"),
        (("gpt-4", None, None), "gpt-4"),
        (("openai", "o9", "{OPENAI}"), "o9"),
    ],
)
def test_openai_model_is_looked_up(openai, judge, model):
    judge = [word and word.format(OPENAI=openai_api.OPENAI) for word in judge]
    openai_api.check_served(*judge, "mt_bench")
    assert openai.asked == [(f"/v1/models/{model}", "Bearer sk-key")]

    openai.status = 404
    with pytest.raises(
        UserError,
        match=f"mt_bench.judge is {judge[0]}, but OpenAI has no model {model} .*to another",
    ) as caught:
        openai_api.check_served(*judge, "mt_bench")
    assert "\n" not in str(caught.value)
    openai.status = 401
    with pytest.raises(UserError, match="OpenAI refuses the key") as caught:
        openai_api.check_served(*judge, "mt_bench")
    assert "sk-key" not in str(caught.value)


def test_failing_or_silent_server_gives_no_error(openai, monkeypatch):
    for openai.status in (403, 429, 500):
        openai_api.check_served("gpt-4", None, None, "mt_bench")
    monkeypatch.setattr(openai_api, "OPENAI", "http://127.0.0.1:9/v1")
    openai_api.check_served("gpt-4", None, None, "mt_bench")


def test_other_judges_are_not_looked_up(openai, monkeypatch):
    for judge in (
        ("judge", None, None),
        ("preference", None, None),
        ("openai", "mine", "http://localhost:8000/v1"),
        ("some_annotators_config", None, None),
    ):
        openai_api.check_served(*judge, "alpaca_eval")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    openai_api.check_served("gpt-4", None, None, "mt_bench")
    assert openai.asked == []


def test_openai_address_needs_a_key(openai, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(
        UserError, match="export OPENAI_API_KEY, or choose another alpaca_eval.judge"
    ):
        openai_api.check_served("openai", "o9", openai_api.OPENAI, "alpaca_eval")


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "ftp://x",
        "http://[::1",
        "http://a b/v1",
        "http://a\tb/v1",
        "http://a:99999",
        "http://a:0",
        "http://a:b",
        "http://",
        "http:///v1",
        "localhost:8000",
        "",
        " http://a",
        "http://a/v1\n",
        "//a/v1",
    ],
)
@pytest.mark.parametrize(
    "judging",
    [
        judges.ALPACA_EVAL,
        judges.MT_BENCH,
        judges.GRADES,
    ],
)
def test_invalid_address_is_refused_before_any_work(judging, url):
    with pytest.raises(UserError, match=rf"{judging.section}\.judge_base_url") as caught:
        judging.check(chosen("openai", url), key=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:8000/v1",
        "https://api.example.com/v1",
        "http://[::1]:80",
        "http://10.0.0.1",
        "HTTP://a/",
        "http://node_1:8000/v1",
    ],
)
def test_valid_address_is_accepted(url):
    openai_api.check_address(url, "alpaca_eval.judge_base_url")


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@host/v1",
        "http://hunter2@host/v1",
        "http://user:hunter2@[::1/v1",
        "http://user:hunter2@host:x/v1",
        "user:hunter2@host",
    ],
)
@pytest.mark.parametrize(
    "judging",
    [
        judges.ALPACA_EVAL,
        judges.MT_BENCH,
        judges.GRADES,
    ],
)
def test_password_in_an_address_is_refused_and_hidden(judging, url):
    for judge in ("openai", "preference" if judging is judges.GRADES else "gpt-4-0613"):
        with pytest.raises(
            UserError, match=rf"{judging.section}\.judge_base_url contains a name or password"
        ) as caught:
            judging.check(chosen(judge, url), key=False)
        assert "hunter2" not in str(caught.value)
