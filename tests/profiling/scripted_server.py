"""A server that answers as it is told to, and a clock that only its own delays move."""

import asyncio
import json
import selectors
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from relaxlm.profiling.serving_client import Server

T = TypeVar("T")
HOST = "127.0.0.1"
# Seconds of real time in which what was sent to a socket of this machine has surely come.
SETTLED = 0.005


class _Selector(selectors.DefaultSelector):
    """Where nothing is ready, time jumps to the next moment that somebody waits for."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> list:
        ready = super().select(SETTLED if timeout else timeout)
        if not ready and timeout:
            self.now += timeout
        return ready


def run_virtual(main: Awaitable[T]) -> T:
    """Run to the end in a loop whose `time()` counts delays alone, whatever the machine's speed."""
    selector = _Selector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@dataclass
class Reply:
    """What is sent back: seconds to wait and then bytes, in turns."""

    parts: list[tuple[float, bytes]]

    @classmethod
    def of_json(cls, content: Any, status: int = 200) -> "Reply":
        body = json.dumps(content).encode()
        return cls([(0, head(status, f"Content-Length: {len(body)}") + body)])

    @classmethod
    def of_events(cls, events: list[tuple[float, Any]], done: bool = True) -> "Reply":
        """A stream of server-sent events, each in a chunk of its own."""
        texts = [(delay, json.dumps(event)) for delay, event in events]
        texts += [(0, "[DONE]")] if done else []
        parts = [(delay, chunk(f"data: {text}\n\n".encode())) for delay, text in texts]
        return cls([(0, head(200, "Transfer-Encoding: chunked")), *parts, (0, chunk(b""))])


def head(status: int, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} Reason", *headers, "", ""]).encode()


def chunk(content: bytes) -> bytes:
    return f"{len(content):x}\r\n".encode() + content + b"\r\n"


def piece(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


def usage(prompt: int, output: int, cached: int) -> dict[str, Any]:
    details = {"cached_tokens": cached}
    counts = {"prompt_tokens": prompt, "completion_tokens": output}
    more = {"prompt_tokens_details": details, "extra": {"queue_s": 0.25}}
    return {"choices": [], "usage": {**counts, **more}}


Answer = Callable[[str, str, dict[str, Any]], Reply]


@dataclass
class Scripted:
    """`answer` gets a request's method, path and body; `asked` keeps them."""

    answer: Answer
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    _tasks: list[asyncio.Task] = field(default_factory=list)

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        return Server(HOST, self._server.sockets[0].getsockname()[1])

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.append(task)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        self.headers = lines[1:]
        length = next(int(line.split()[1]) for line in lines if line.startswith("Content-Length"))
        body = json.loads(await reader.readexactly(length) or b"null")
        method, path, _ = lines[0].split()
        self.asked.append((method, path, body))
        try:
            for delay, content in self.answer(method, path, body).parts:
                await asyncio.sleep(delay)
                writer.write(content)
        finally:
            writer.close()
