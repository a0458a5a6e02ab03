"""Replies that arrive piece by piece."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Generic, TypeVar

from relaxlm.openai_api.errors import ApiError, api_error
from relaxlm.openai_api.replies import ReplyModel

Chunk = TypeVar("Chunk", bound=ReplyModel)


class ReplyStream(Generic[Chunk]):
    """The chunks of one reply, in order. An error of the request is raised as `ApiError`.

    Whoever does not read to the end calls `aclose`, which cancels the request in the engine.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[Chunk, None],
        cancel: Callable[[], None],
        named_events: bool = False,
    ) -> None:
        """
        Args:
            chunks: gives the chunks; not started yet.
            cancel: ends the request, if it has not ended; may be called twice.
            named_events: server-sent events carry the chunk's `type` as their name, and no [DONE]
                ends the stream.
        """
        self._chunks, self._cancel, self._named = chunks, cancel, named_events
        self._reading = False

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        self._reading = True
        try:
            return await self._chunks.__anext__()
        except StopAsyncIteration:
            raise
        except BaseException as error:
            self._cancel()
            if isinstance(error, Exception):
                raise api_error(error) from error
            raise
        finally:
            self._reading = False

    async def aclose(self) -> None:
        """End the request. Another task that waits for a chunk finds the stream at its end."""
        self._cancel()
        if not self._reading:
            await self._chunks.aclose()

    async def __aenter__(self) -> ReplyStream[Chunk]:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # A generator that never started runs no `finally`.
        self._cancel()

    async def events(self, failed: Callable[[ApiError], None] | None = None) -> AsyncIterator[str]:
        """The stream as server-sent events; an error is told as the last one.

        Args:
            failed: is told of the error, for a log.
        """
        sequence = 0
        try:
            async for chunk in self:
                sequence += 1
                yield self._event(getattr(chunk, "type", None), chunk.as_json())
        except ApiError as error:
            if failed is not None:
                failed(error)
            if self._named:
                data = {**error.details(), "type": "error", "sequence_number": sequence}
                yield self._event("error", json.dumps(data))
                return
            yield self._event(None, json.dumps(error.body()))
        finally:
            await self.aclose()
        if not self._named:
            yield "data: [DONE]\n\n"

    def _event(self, name: str | None, data: str) -> str:
        head = f"event: {name}\n" if self._named else ""
        return f"{head}data: {data}\n\n"
