"""Requests in the engine on behalf of one client, and the way of their news to an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from relaxlm.engine.types import (
    FinishReason,
    GenerationRequest,
    PromptReport,
    RequestTimings,
    TokenText,
    Update,
)
from relaxlm.errors import BusyError, RelaxLMError

if TYPE_CHECKING:
    from relaxlm.engine.loop import EngineLoop


@dataclass
class ChoiceNews:
    """What one reply has gained since its reader last looked; as `engine.types.ChoiceUpdate`."""

    index: int
    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stopped_by: int | str | None = None


@dataclass
class News:
    """Updates of one request, merged. `slot` is its place among those submitted together."""

    slot: int
    choices: dict[int, ChoiceNews] = field(default_factory=dict)
    prompt: PromptReport | None = None
    timings: RequestTimings | None = None
    error: RelaxLMError | None = None
    finished: bool = False

    def add(self, update: Update) -> None:
        for given in update.choices:
            choice = self.choices.setdefault(given.index, ChoiceNews(given.index))
            choice.text += given.text
            choice.tokens += given.tokens
            if given.finish_reason is not None:
                choice.finish_reason, choice.stopped_by = given.finish_reason, given.stopped_by
        self.prompt = update.prompt or self.prompt
        self.timings = update.timings or self.timings
        self.error = update.error or self.error
        self.finished = update.finished or self.finished


class Submission:
    """Runs requests side by side. Lives on one event loop; the engine delivers from its thread.

    A reader that falls behind gets merged news: no more is kept for it than the replies' tokens,
    of which the context window limits the number.
    """

    def __init__(
        self,
        engine: EngineLoop,
        requests: Sequence[GenerationRequest],
        eager: bool,
        on_update: Callable[[Update], None] | None = None,
    ) -> None:
        """
        Args:
            eager: tell the reader of every update; otherwise only when a request has ended.
            on_update: is told of every update first, on the engine's output thread.

        Raises:
            RequestError, BusyError: the engine does not take one of them; none of them runs then.
        """
        self._engine, self._eager, self._on_update = engine, eager, on_update
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()  # around the next two
        self._pending: dict[int, News] = {}
        self._told = False  # that there is something pending
        self._running: dict[int, int] = {}  # slot -> the engine's id
        self._finished: set[int] = set()
        self._total = len(requests)
        self._cancelled = False
        try:
            for slot, request in enumerate(requests):
                self._running[slot] = engine.submit(request, partial(self._deliver, slot))
        except BaseException:
            self.cancel()
            raise

    async def news(self) -> list[News]:
        """What has happened since the last call, at least one piece; [] when all is over, or given
        up by `cancel`.

        Raises:
            RelaxLMError: one request failed, or the engine has ended; the others are cancelled.
        """
        if self._cancelled or len(self._finished) == self._total:
            return []
        await self._arrived.wait()
        self._arrived.clear()
        if self._cancelled:
            return []
        with self._lock:
            pending, self._pending, self._told = self._pending, {}, False
        found = [pending[slot] for slot in sorted(pending)]
        for news in found:
            if news.finished:
                self._finished.add(news.slot)
        for news in found:
            if news.error is not None:
                self.cancel()
                raise news.error
            if any(choice.finish_reason == "cancelled" for choice in news.choices.values()):
                self.cancel()
                raise BusyError("the engine ended before the reply did", closing=True)
        return found

    def cancel(self) -> None:
        """End what still runs. From the event loop's thread, or when the loop is gone."""
        if self._cancelled:
            return
        self._cancelled = True
        for slot, request_id in self._running.items():
            if slot not in self._finished:
                self._engine.cancel(request_id)

    def _deliver(self, slot: int, update: Update) -> None:
        if self._on_update is not None:
            self._on_update(update)
        with self._lock:
            self._pending.setdefault(slot, News(slot)).add(update)
            tell = not self._told and (self._eager or update.finished)
            self._told |= tell
        if tell:
            try:
                self._loop.call_soon_threadsafe(self._arrived.set)
            except RuntimeError:  # the event loop has ended, and with it the reader
                self._engine.cancel(update.request_id)
