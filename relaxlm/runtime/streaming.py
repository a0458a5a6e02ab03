"""Receivers of text while it is generated: `progress_callback` of `ChatModule.generate`."""

import queue
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TextIO

from relaxlm.errors import RequestError


class StreamCallback(ABC):
    """Gets the text of a reply piece by piece.

    Attributes:
        callback_interval: how many tokens are gathered before `text` is called.
        cancelled: whether `cancel` has been called during this generation.
    """

    cancelled = False

    def __init__(self, callback_interval: int = 1) -> None:
        if callback_interval < 1:
            raise RequestError(
                f"callback_interval = {callback_interval}: expected a number of tokens from 1 on"
            )
        self.callback_interval = callback_interval
        self._gathered, self._tokens = "", 0

    def cancel(self) -> None:
        """End the reply after the current step, from any thread; what it has so far is the reply.

        The conversation goes on with that. If there is no text yet, it is as if the prompt had not
        been asked.
        """
        self.cancelled = True

    def on_token(self, text: str) -> None:
        """Called after every token with the text that became final."""
        self._gathered += text
        self._tokens += 1
        if self._tokens % self.callback_interval == 0:
            self._pass_on()

    def on_end(self, error: BaseException | None = None) -> None:
        """Called once, after the last token or when generation failed."""
        self._tokens, self.cancelled = 0, False
        try:
            self._pass_on()
        finally:
            self.ended(error)

    def _pass_on(self) -> None:
        gathered, self._gathered = self._gathered, ""
        if gathered:
            self.text(gathered)

    @abstractmethod
    def text(self, delta: str) -> None:
        """The next piece of text, never empty."""

    @abstractmethod
    def ended(self, error: BaseException | None) -> None:
        """No more text will come; `error` is why, if generation failed."""


class StreamToStdout(StreamCallback):
    """Writes the reply to standard output (or another text stream) as it comes."""

    def __init__(self, callback_interval: int = 2, stream: TextIO | None = None) -> None:
        super().__init__(callback_interval)
        self._stream = stream
        self._started = False

    def text(self, delta: str) -> None:
        self._started = True
        print(delta, end="", flush=True, file=self._stream or sys.stdout)

    def ended(self, error: BaseException | None) -> None:
        if self._started or error is None:
            print(file=self._stream or sys.stdout, flush=True)
        self._started = False


class StreamIterator(StreamCallback):
    """Iterate over the reply in one thread while another one generates it.

        stream = StreamIterator(callback_interval=2)
        Thread(target=chat.generate, args=("Hello",), kwargs={"progress_callback": stream}).start()
        for delta in stream:
            ...

    An error of the generation is raised to whoever iterates. Each iteration is over one reply.
    """

    def __init__(self, callback_interval: int = 2) -> None:
        super().__init__(callback_interval)
        self._queue: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

    def text(self, delta: str) -> None:
        self._queue.put(delta)

    def ended(self, error: BaseException | None) -> None:
        self._queue.put(error)

    def __iter__(self) -> Iterator[str]:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
