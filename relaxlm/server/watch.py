"""Work for a client that may go away, run out of time, or meet the server's end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from relaxlm.server.errors import ClientGone, out_of_time, shutting_down

T = TypeVar("T")


class Lifetime:
    """Whether the server takes requests, and whether it still works on them.

    Attributes:
        closing: new requests are refused.
        ended: the time of running ones is over.
    """

    def __init__(self) -> None:
        self.closing = self.ended = False
        # Not one asyncio.Event: it belongs to one event loop, and an application may have several.
        self._waiting: set[asyncio.Future[None]] = set()

    def end(self) -> None:
        """Stop working on what still runs; from any event loop."""
        self.closing = self.ended = True
        for waiting in tuple(self._waiting):
            waiting.get_loop().call_soon_threadsafe(waiting.cancel)

    async def wait_for_end(self) -> None:
        if self.ended:
            return
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.add(waiting)
        try:
            await asyncio.wait([waiting])
        finally:
            self._waiting.discard(waiting)


class Deadline:
    """When a request's time is over, counted from here on.

    Args:
        seconds: that it may take; None: no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._started = time.monotonic()

    def left(self) -> float | None:
        if self.seconds is None:
            return None
        return max(self._started + self.seconds - time.monotonic(), 0)


async def watched(
    work: Coroutine[Any, Any, T], receive: Receive, deadline: Deadline, lifetime: Lifetime
) -> T:
    """The result of `work`, which is cancelled as soon as nobody needs it.

    Args:
        receive: of a request whose body has been read.

    Raises:
        ClientGone: the connection ended first.
        ApiError: 504 after the deadline; 503 when the server ends.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    ended = asyncio.ensure_future(lifetime.wait_for_end())
    tasks: set[asyncio.Future[Any]] = {task, gone, ended}
    try:
        await asyncio.wait(tasks, timeout=deadline.left(), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGone
        if ended.done():
            raise shutting_down()
        raise out_of_time(deadline.seconds or 0)
    finally:
        for one in tasks:
            one.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
