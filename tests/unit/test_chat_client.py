"""The client of a judge behind an API: what it keeps, and how many unreadable answers it takes."""

from __future__ import annotations

import pytest
from chat_server import chat_server

from sppo.core.chat_client import Client
from sppo.core.errors import UserError


@pytest.fixture
def client(tmp_path):
    """A client of a judge that counts its answers."""
    with chat_server(lambda messages: f"answer {len(server.asked)}") as server:
        yield Client("m", server.url, tmp_path / "kept.jsonl", lambda text: "answer" in text)


def test_answers_are_kept_by_temperature_and_length(client):
    chat = [{"role": "user", "content": "Hi"}]
    first = client.ask(chat, 0.0, 10)
    assert client.ask(chat, 0.0, 10) == first
    assert client.ask(chat, 0.7, 10) != first
    assert client.ask(chat, 0.0, 20) != first


@pytest.mark.parametrize("asked", [10, 9])
def test_a_fifth_of_the_answers_can_be_unreadable(client, asked, capsys):
    client.unreadable = ["what?", "I cannot say."]
    if asked == 10:
        client.check_unreadable(asked)
        assert "2 of 10 answers" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match="2 of 9 answers .* at most 20%"):
            client.check_unreadable(asked)
