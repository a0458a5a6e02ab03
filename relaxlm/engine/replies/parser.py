"""A reply's text, in any pieces, to its content, reasoning and tool calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relaxlm.engine.replies.reader import NotACall, Reader, Wait
from relaxlm.engine.replies.sink import NewId, Sink, openai_id
from relaxlm.engine.replies.types import Delta, ReplyMessage

CallReader = Callable[[Reader, Sink, str], Wait]
"""Reads the calls behind a mark; raises NotACall before it has passed on anything."""


@dataclass(frozen=True)
class ReasoningTags:
    """The text in front of a model's chain of thought, and behind it; and around the answer that
    follows, if a model marks that, too."""

    begin: str
    end: str
    answer: tuple[str, str] | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.begin, self.end, *(self.answer or ()))


class ReplyParser:
    """Takes a reply's text as it becomes final, and gives what is new in it.

    The deltas of `push` and `finish` together are the message, however the text is cut.
    """

    def __init__(self, read: Callable[[Reader, Sink], Wait], new_id: NewId | None = None) -> None:
        self._reader = Reader()
        self._sink = Sink(new_id or openai_id)
        self._steps = read(self._reader, self._sink)
        self._ended = False

    def push(self, text: str) -> list[Delta]:
        """What `text` adds to the reply. Some of it may be held back until more is known."""
        if text:
            self._reader.feed(text)
            self._run()
        return self._sink.take()

    def finish(self) -> list[Delta]:
        """What was held back, because the reply has ended."""
        self._reader.ended = True
        self._run()
        self._sink.finish()
        return self._sink.take()

    def message(self) -> ReplyMessage:
        """All that has been passed on; the whole reply after `finish`."""
        return self._sink.message()

    def _run(self) -> None:
        if not self._ended:
            self._ended = next(self._steps, self._steps) is self._steps


def read_reply(
    reader: Reader,
    sink: Sink,
    reasoning: ReasoningTags | None,
    inside: bool,
    marks: Sequence[str],
    read_calls: CallReader | None,
    on_lines: bool = False,
    in_reasoning: bool = False,
) -> Wait:
    """Reasoning, if the reply begins with it, then content and calls.

    Args:
        inside: the prompt has opened the reasoning already.
        marks: texts that may begin a call; none is the beginning of another.
        on_lines: they do so at the beginning of a line only, behind white space at most.
        in_reasoning: they also do so in the reasoning, which ends there.
    """
    answer_end = None
    if reasoning is not None:
        ends = marks if in_reasoning else ()
        yield from _read_reasoning(reader, sink, reasoning, inside, ends)
        if reasoning.answer and sink.has_reasoning:
            begin, end = reasoning.answer
            if (yield from reader.skip_after_space(begin)):
                answer_end = end
    new_line = True
    while True:
        reader.forget()
        ends = () if answer_end is None else (answer_end,)
        before, mark = yield from reader.until([*marks, *ends])
        sink.content(before)
        _, line_end, line = before.rpartition("\n")
        new_line = (new_line or bool(line_end)) and not line.strip()
        if mark is None:
            if not before:
                return
            continue
        if mark == answer_end:
            sink.drop_space()
            answer_end = None
            continue
        start = reader.pos
        try:
            assert read_calls is not None
            reader.check_patience()
            if on_lines and not new_line:
                raise NotACall
            yield from read_calls(reader, sink, mark)
        except NotACall:
            reader.back(start)
            sink.content(mark)
        new_line = True


def _read_reasoning(
    reader: Reader, sink: Sink, tags: ReasoningTags, inside: bool, ends: Sequence[str]
) -> Wait:
    """`ends` are other texts that end the reasoning, and begin what follows."""
    # A model may write the tag that its prompt ends with once more.
    if not (yield from reader.skip_after_space(tags.begin)) and not inside:
        return
    mark = None
    while mark is None:
        reader.forget()
        before, mark = yield from reader.until([tags.end, *ends])
        sink.reasoning(before)
        if mark is None and not before:
            return
    if mark != tags.end:
        reader.pos -= len(mark)
