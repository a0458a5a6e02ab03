"""Serves the chat page, and answers its requests as a test tells it to."""

from __future__ import annotations

import json
import queue
import select
import socket
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[3] / "relaxlm" / "server" / "page"
FILES = {file.name for file in PAGE.iterdir()}
MODEL = "scripted-model"
# The strictest policy that the page promises to live with: scripts and styles are files of this
# server, and nothing is ever parsed as HTML.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 34,
    "total_tokens": 46,
    "prompt_tokens_details": {"cached_tokens": 5},
}
POLL_SECONDS = 0.02
LONGEST_WAIT_SECONDS = 20

Delta = dict[str, str]


@dataclass
class Answer:
    """To one chat completion.

    Attributes:
        deltas: sent at once. live: then what the test puts here, until it puts None.
        finish: the reason to end; None ends the stream without one.
        status, error, headers: of an answer that is no stream, unless the status is 200.
        failure: an error inside the stream, after the deltas.
    """

    deltas: Iterable[Delta] = ()
    live: queue.Queue[Delta | None] | None = None
    finish: str | None = "stop"
    usage: dict[str, Any] | None = field(default_factory=lambda: dict(USAGE))
    status: int = 200
    error: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    failure: dict[str, Any] | None = None


def text(*pieces: str) -> list[Delta]:
    return [{"content": piece} for piece in pieces]


class PageServer(ThreadingHTTPServer):
    """Attributes:
    answers: to the next requests; after them, a short text.
    requests: bodies of chat completions. keys: their Authorization headers.
    key: required if not None.
    asked, gone: set when a completion was asked for, and when a client went away during a stream.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reset()

    def reset(self) -> None:
        self.answers: deque[Answer] = deque()
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.key: str | None = None
        self.models = [MODEL]
        self.asked, self.gone = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a browser may close any connection at any time


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            if not self._key_fits():
                return self._refuse_key()
            return self._json(200, {"data": [{"id": name} for name in self.server.models]})
        name = "index.html" if self.path == "/" else self.path.removeprefix("/page/")
        kind = TYPES.get(name.rpartition(".")[2])
        if kind is None or name not in FILES:
            return self._json(404, {"error": {"message": "not found"}})
        content = (PAGE / name).read_bytes()
        return self._send(200, kind, content, {"Content-Security-Policy": POLICY})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._key_fits():
            return self._refuse_key()
        self.server.requests.append(body)
        self.server.keys.append(self.headers["Authorization"])
        answers = self.server.answers
        answer = answers.popleft() if answers else Answer(text("An ", "answer."))
        self.server.asked.set()
        if answer.status != 200:
            return self._json(answer.status, answer.error, answer.headers)
        return self._stream(answer)

    def _key_fits(self) -> bool:
        return self.server.key in (None, (self.headers["Authorization"] or "")[len("Bearer ") :])

    def _refuse_key(self) -> None:
        given = "wrong" if self.headers["Authorization"] else "missing"
        self._json(401, {"error": {"message": f"The API key is {given}."}})

    def _json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, str) else json.dumps(content)
        self._send(status, "application/json", data.encode(), headers or {})

    def _send(self, status: int, kind: str, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, answer: Answer) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for delta in self._deltas(answer):
                self._event(_chunk(delta))
            if answer.failure:
                self._event({"error": answer.failure})
            elif answer.finish:
                self._event(_chunk({}, answer.finish))
                if answer.usage:
                    self._event({"choices": [], "usage": answer.usage})
                self.wfile.write(b"data: [DONE]\n\n")
        except ConnectionError:
            self.server.gone.set()

    def _deltas(self, answer: Answer) -> Iterator[Delta]:
        yield from answer.deltas
        for _ in range(int(LONGEST_WAIT_SECONDS / POLL_SECONDS)):
            if answer.live is None:
                return
            try:
                delta = answer.live.get(timeout=POLL_SECONDS)
            except queue.Empty:
                self._check_client()
                continue
            if delta is None:
                return
            yield delta

    def _check_client(self) -> None:
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and self.connection.recv(1, socket.MSG_PEEK) == b"":
            raise ConnectionResetError("the client is gone")

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")
        self.wfile.flush()


def _chunk(delta: Delta, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"object": "chat.completion.chunk", "model": MODEL, "choices": [choice]}
