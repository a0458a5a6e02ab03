"""Server-sent events: a response that is written while it is made."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, cast

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from relaxlm.openai_api.errors import ApiError, api_error
from relaxlm.openai_api.stream import ReplyStream
from relaxlm.server.errors import ClientGone
from relaxlm.server.watch import Deadline, Lifetime, watched

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]
_COMMENT = b": keep-alive\n\n"


class EventStream(Response):
    """A response of events, and comments while there is nothing to tell.

    An error in the middle becomes the last event of the stream.

    Args:
        stream: what the service returned; cancelled as soon as the client goes away.
        named: whether its events carry names.
        failed: told of each error.
    """

    def __init__(
        self,
        stream: ReplyStream[Any],
        lifetime: Lifetime,
        deadline: Deadline,
        *,
        named: bool,
        keep_alive: float,
        failed: Callable[[ApiError], None],
    ) -> None:
        super().__init__()
        self._stream, self._lifetime, self._named = stream, lifetime, named
        self._deadline, self._keep_alive, self._failed = deadline, keep_alive, failed
        self._count = 0  # events so far
        self._last = 0.0  # when something was sent
        self._sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        comments = asyncio.ensure_future(self._comments(send))
        try:
            await self._send(
                send, {"type": "http.response.start", "status": 200, "headers": _HEADERS}
            )
            await watched(self._write(send), receive, self._deadline, self._lifetime)
        except ClientGone:
            return
        except Exception as error:
            told = api_error(error)
            if told is not error:
                told.__cause__ = error
            self._failed(told)
            await self._send(send, _body(self._error_event(told)))
        finally:
            comments.cancel()
        await self._send(send, _body(b"", more=False))

    async def _write(self, send: Send) -> None:
        events = cast(AsyncGenerator[str, None], self._stream.events(self._failed))
        async with aclosing(self._stream), aclosing(events):
            async for text in events:
                await self._send(send, _body(text.encode()))
                self._count += 1
                # Others get their turn, and the end of the connection is noticed.
                await asyncio.sleep(0)

    async def _send(self, send: Send, message: Message) -> None:
        self._sending = True
        try:
            await send(message)
        finally:
            self._sending = False
        self._last = asyncio.get_running_loop().time()

    async def _comments(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._last = loop.time()
        while True:
            await asyncio.sleep(max(self._last + self._keep_alive - loop.time(), 0.01))
            if not self._sending and loop.time() >= self._last + self._keep_alive:
                await self._send(send, _body(_COMMENT))

    def _error_event(self, error: ApiError) -> bytes:
        """The end of a stream, as the services tell an error in one of theirs."""
        if self._named:
            data = {**error.details(), "type": "error", "sequence_number": self._count}
            return f"event: error\ndata: {json.dumps(data)}\n\n".encode()
        return f"data: {json.dumps(error.body())}\n\ndata: [DONE]\n\n".encode()


def _body(data: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
