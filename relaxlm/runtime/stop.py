"""Stop strings in text that arrives piece by piece."""

from collections.abc import Iterable

from relaxlm.errors import RequestError


class StopStrings:
    """Passes text on up to the first stop string, and never a part of that stop string.

    The first stop string is the one that is complete first; of several that are complete with the
    same character, the longest. How the text is cut into pieces makes no difference. Text that may
    be the beginning of a stop string is held back until it has turned out to be one or not; so
    nothing is held back longer than the longest stop string.

    Strings are compared code point by code point, without Unicode normalization.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        """
        Raises:
            RequestError: a stop string is empty.
        """
        self.stops = tuple(dict.fromkeys(stops))
        if "" in self.stops:
            raise RequestError("a stop string is empty: expected at least one character")
        self.matched: str | None = None
        self._held = ""

    @property
    def stopped(self) -> bool:
        return self.matched is not None

    def push(self, text: str) -> tuple[str, bool]:
        """Add a piece of text.

        Returns:
            Text to pass on, and whether a stop string was found (now or before): then nothing
            follows, and `matched` says which.
        """
        if self.stopped:
            return "", True
        text = self._held + text
        found = []
        for stop in self.stops:
            start = text.find(stop)
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start], True
        ready = len(text) - self._possible_start(text)
        self._held = text[ready:]
        return text[:ready], False

    def flush(self) -> str:
        """The text held back, when no more will come."""
        text, self._held = self._held, ""
        return text

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = 0
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
