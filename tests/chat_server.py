"""A server with OpenAI's interface whose answers a test decides."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from listener import serving

Messages = list[dict[str, str]]


class ChatServer(ThreadingHTTPServer):
    """Answers each request with `answer(messages)`; an int is an HTTP status. Keeps `asked`."""

    def __init__(self, answer: Callable[[Messages], str | int]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.asked: list[Messages] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(request["messages"])
        said = self.server.answer(request["messages"])
        if isinstance(said, int):
            return self.reply(said, {"error": {"message": "no"}})
        message = {"role": "assistant", "content": said}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"]}
        self.reply(200, body | {"choices": [choice]})

    def reply(self, status: int, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def chat_server(answer: Callable[[Messages], str | int]) -> Iterator[ChatServer]:
    server = ChatServer(answer)
    with serving(server):
        yield server
