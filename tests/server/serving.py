"""Servers for tests: in a thread, for an engine or for answers that a test makes up."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from relaxlm.engine.types import EngineStats
from relaxlm.openai_api.errors import ApiError
from relaxlm.openai_api.replies import (
    Completion,
    CompletionChoice,
    Model,
    ModelList,
    Usage,
)
from relaxlm.openai_api.requests import CompletionRequest
from relaxlm.openai_api.stream import ReplyStream
from relaxlm.server import app as app_module
from relaxlm.server.app import ApiServer
from relaxlm.server.run import Server, bind
from relaxlm.server.settings import ServerSettings


@dataclass
class Running:
    """A server that takes requests."""

    port: int
    api: ApiServer
    server: Server
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, buffer: int | None = None) -> socket.socket:
        """A client; `buffer` is what the system may hold for it, in bytes."""
        client = socket.socket()
        if buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client.settimeout(20)
        client.connect(("127.0.0.1", self.port))
        return client

    def say(self, data: bytes) -> bytes:
        """What the server answers to these bytes, until it closes the connection."""
        with self.connect() as client:
            client.sendall(data)
            return read_all(client)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@contextmanager
def running(api: ApiServer, buffer: int | None = None) -> Iterator[Running]:
    """
    Args:
        buffer: what the system may hold of each response, in bytes.
    """
    sockets = bind(api.settings.host, 0)
    if buffer is not None:
        sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    port = sockets[0].getsockname()[1]
    server = Server(api, "warning", access_log=False)
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets}, daemon=True)
    thread.start()
    started = Running(port, api, server, thread)
    try:
        wait_until(lambda: server.started)
        yield started
    finally:
        started.stop()
        api.close()


@dataclass
class FakeService:
    """Stands for ApiService: answers are what a test says.

    Attributes:
        answer: for requests without stream. pieces: for those with; given the running number.
        cancelled: how many requests ended before their answer did.
    """

    answer: Callable[[], Any] = lambda: _nothing()
    pieces: Callable[[], AsyncGenerator[str, None]] = lambda: _no_pieces()
    cancelled: int = 0
    seen: list[CompletionRequest] = field(default_factory=list)

    async def complete(self, request: CompletionRequest) -> Any:
        self.seen.append(request)
        if request.stream:
            ended: list[bool] = []
            return ReplyStream(self._chunks(ended), lambda: self._cancel(ended))
        try:
            return completion(await self.answer() or "")
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _chunks(self, ended: list[bool]) -> AsyncGenerator[Completion, None]:
        async for text in self.pieces():
            yield completion(text)
        ended.append(True)

    def _cancel(self, ended: list[bool]) -> None:
        if not ended:
            ended.append(True)
            self.cancelled += 1

    def models(self) -> ModelList:
        return ModelList(data=[Model(id="fake", created=0, max_model_len=1)])

    def model(self, name: str) -> Model:
        raise ApiError(f"no model {name}", 404, code="model_not_found")

    def __getattr__(self, name: str) -> Any:
        return self.complete  # routes that no test of HTTP alone asks for

    def close(self) -> None:
        pass


class FakeEngine:
    failure = None

    def stats(self) -> EngineStats:
        return EngineStats(pages_total=7)


def fake_api(service: FakeService | None = None, **settings: Any) -> ApiServer:
    service = service or FakeService()
    with mock.patch.object(app_module, "ApiService", lambda *args, **options: service):
        return ApiServer(FakeEngine(), ServerSettings(**settings))  # type: ignore[arg-type]


def completion(text: str) -> Completion:
    return Completion(
        id="cmpl-1",
        created=0,
        model="fake",
        choices=[CompletionChoice(index=0, text=text, finish_reason="stop")],
        usage=Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2),
        system_fingerprint="fake",
    )


def post(body: bytes, path: str = "/v1/completions", **headers: str) -> bytes:
    """A request as bytes; the server closes the connection after it."""
    lines = {
        "Host": "localhost",
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def read_all(client: socket.socket) -> bytes:
    data = b""
    while True:
        try:
            part = client.recv(65536)
        except ConnectionResetError:
            return data
        if not part:
            return data
        data += part


def wait_until(happened: Callable[[], bool], seconds: float = 20) -> None:
    """For what another thread or process does."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if happened():
            return
        pause.wait(0.01)
    raise AssertionError(f"nothing happened in {seconds} s")


async def _nothing() -> str:
    return ""


async def _no_pieces() -> AsyncGenerator[str, None]:
    yield ""
