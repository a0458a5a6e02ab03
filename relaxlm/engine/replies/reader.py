"""Text that arrives in pieces, read by generators as if it were all there.

A parser is a generator that yields where it needs more text. What it decides depends on the
characters alone and not on how they were cut, because a decision waits until the text that it
needs is there, or until there is no more.
"""

from collections.abc import Generator, Sequence

Wait = Generator[None, None, None]
"""A generator that yields whenever it needs more text."""


class NotACall(Exception):
    """What looked like the beginning of a tool call is none."""


# Characters that may be read in vain, because what looks like a call is none. Without a limit the
# time for a reply could grow by the square of its length.
_VAIN_LIMIT = 1_000_000


class Reader:
    """The text that is still to be read is `text[pos:]`; `ended` means that no more will come."""

    def __init__(self) -> None:
        self.text = ""
        self.pos = 0
        self.ended = False
        self._vain = 0

    def back(self, pos: int) -> None:
        """Go back to where an attempt began that has failed."""
        self._vain += self.pos - pos
        self.pos = pos

    def check_patience(self) -> None:
        """
        Raises:
            NotACall: too many attempts have failed; the rest of the reply is content.
        """
        if self._vain > _VAIN_LIMIT:
            raise NotACall

    def feed(self, piece: str) -> None:
        self.text += piece

    def forget(self) -> None:
        """Drop what was read. Positions that were noted before are no longer valid."""
        self.text = self.text[self.pos :]
        self.pos = 0

    def more(self) -> Generator[None, None, bool]:
        """Wait for more text; False if there is none."""
        length = len(self.text)
        while len(self.text) == length:
            if self.ended:
                return False
            yield
        return True

    def take_rest(self) -> str:
        """All text that is here now."""
        rest = self.text[self.pos :]
        self.pos = len(self.text)
        return rest

    def peek(self) -> Generator[None, None, str]:
        """The next character, "" at the end."""
        while self.pos == len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.pos]

    def expect(self, text: str) -> Wait:
        """
        Raises:
            NotACall: other text is next.
        """
        if not (yield from self.skip(text)):
            raise NotACall

    def skip(self, text: str) -> Generator[None, None, bool]:
        """Go past `text` if it is next, and tell whether it was."""
        while True:
            found = self.text[self.pos : self.pos + len(text)]
            if found == text:
                self.pos += len(text)
                return True
            if not text.startswith(found) or not (yield from self.more()):
                return False

    def skip_space(self) -> Wait:
        while (char := (yield from self.peek())) and char in " \t\r\n":
            self.pos += 1

    def skip_after_space(self, text: str) -> Generator[None, None, bool]:
        """Go past white space and `text` if they are next; otherwise past neither."""
        start = self.pos
        yield from self.skip_space()
        if (yield from self.skip(text)):
            return True
        self.pos = start
        return False

    def until(self, marks: Sequence[str]) -> Generator[None, None, tuple[str, str | None]]:
        """Text up to one of `marks`, in steps.

        Returns:
            Text that belongs to none of the marks, and the mark that follows it and was gone past;
            None if more may come before it, or, where `text` is empty, if there is no more text.
        """
        while True:
            found = [(at, mark) for mark in marks if (at := self.text.find(mark, self.pos)) >= 0]
            if found:
                at, mark = min(found)
                before = self.text[self.pos : at]
                self.pos = at + len(mark)
                return before, mark
            end = len(self.text)
            if not self.ended:
                end -= held_back(self.text, self.pos, marks)
            if end > self.pos:
                before = self.text[self.pos : end]
                self.pos = end
                return before, None
            if not (yield from self.more()) and self.pos == len(self.text):
                return "", None


def held_back(text: str, start: int, marks: Sequence[str]) -> int:
    """How many of the last characters of `text[start:]` could be the beginning of a mark."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    for length in range(min(longest, len(text) - start), 0, -1):
        end = text[-length:]
        if any(mark.startswith(end) for mark in marks):
            return length
    return 0
