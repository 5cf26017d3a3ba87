"""A server in the place of the network: it keeps every request, and answers 404."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import sppo

# Variables that keep packages from asking the network, and proxies.
OFFLINE = {
    *sppo.QUIET,
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "DISABLE_TELEMETRY",
    "CI",
}


class Listener(ThreadingHTTPServer):
    """`asked` has the path or the host of each request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Listener

    def answer(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_POST = do_PUT = do_CONNECT = answer

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    """Serve in a thread of this process."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def listening() -> Iterator[Listener]:
    server = Listener()
    with serving(server):
        yield server


def online(environment: dict[str, str]) -> dict[str, str]:
    """The environment of a machine with a network: without `OFFLINE` and without proxies."""
    return {
        name: value
        for name, value in environment.items()
        if name not in OFFLINE and not name.lower().endswith("_proxy")
    }
