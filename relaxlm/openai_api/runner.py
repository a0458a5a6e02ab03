"""Coroutines run from threads: what makes the synchronous interface of the asynchronous one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, Generic, TypeVar

from relaxlm.errors import BusyError
from relaxlm.openai_api.errors import api_error
from relaxlm.openai_api.replies import ReplyModel
from relaxlm.openai_api.stream import ReplyStream

Chunk = TypeVar("Chunk", bound=ReplyModel)
Result = TypeVar("Result")

# Seconds that coroutines get to tell their callers that the engine has ended.
_LAST_WORDS = 5.0


class Runner:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="relaxlm-api", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """The coroutine's result, whichever thread asks; interrupted, it is cancelled.

        Raises:
            ApiError: the runner is closed.
        """
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:
            coroutine.close()
            raise api_error(BusyError("the engine has ended", closing=True)) from None
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the event loop after what still runs on it."""
        self.run(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        self._loop.run_forever()

    async def _finish(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=_LAST_WORDS)
        await self._loop.shutdown_asyncgens()


class Stream(Generic[Chunk]):
    """The chunks of a reply, for a thread. Close it, or use it with `with`, to end it early."""

    def __init__(self, chunks: ReplyStream[Chunk], runner: Runner) -> None:
        self._chunks, self._runner = chunks, runner

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        chunk = self._runner.run(self._next())
        if chunk is None:
            raise StopIteration
        return chunk

    async def _next(self) -> Chunk | None:
        return await anext(self._chunks, None)

    def close(self) -> None:
        """End the request, if it has not ended."""
        self._runner.run(self._chunks.aclose())

    def __enter__(self) -> Stream[Chunk]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
