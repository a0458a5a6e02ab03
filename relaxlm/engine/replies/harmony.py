"""Replies of gpt-oss: messages with headers, each on a channel.

    <|channel|>analysis<|message|>..<|end|><|start|>assistant<|channel|>commentary to=functions.f
    <|constrain|>json<|message|>{..}<|call|>

The prompt ends in <|start|>assistant. The analysis is the reasoning; what is sent to a recipient is
a call; everything else is content. A header that is cut off by the end of the reply is dropped.

Source: openai/harmony, docs/format.md.
"""

import re
from collections.abc import Generator

from relaxlm.engine.replies.reader import Reader, Wait
from relaxlm.engine.replies.sink import Sink

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
CONSTRAIN, END, CALL, RETURN = "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"
TOKENS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)

_ENDS = (END, CALL, RETURN, START)
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")


def read_harmony(reader: Reader, sink: Sink, calls: bool) -> Wait:
    """The whole reply.

    Args:
        calls: whether there are tools; without, a call's text is content.
    """
    previous = ""
    with_header = yield from _header_is_next(reader)
    while True:
        header = (yield from _header(reader)) if with_header else ""
        if header is None:
            return
        found = _CHANNEL.search(header)
        channel = found[1] if found else "final"
        recipient = _RECIPIENT.search(header) if calls else None
        if recipient is not None:
            channel = "call"
            sink.call(recipient[1].removeprefix("functions."))
        elif channel == "analysis":
            sink.reasoning("\n")
        elif previous not in ("", "analysis"):
            sink.content("\n")
        previous = channel
        mark = None
        while mark is None:
            reader.forget()
            text, mark = yield from reader.until(_ENDS)
            if channel == "call":
                sink.arguments(text)
            elif channel == "analysis":
                sink.reasoning(text)
            else:
                sink.content(text)
            if mark is None and not text:
                return
        if not (yield from reader.peek()):
            return
        with_header = mark == START or (yield from _header_is_next(reader))


def _header(reader: Reader) -> Generator[None, None, str | None]:
    """The text up to <|message|>; None if the reply ends before."""
    header = ""
    while True:
        text, mark = yield from reader.until([MESSAGE])
        header += text
        if mark is not None:
            return header
        if not text:
            return None


def _header_is_next(reader: Reader) -> Generator[None, None, bool]:
    start = reader.pos
    for opening in (CHANNEL, START, MESSAGE, " to="):
        found = yield from reader.skip(opening)
        reader.pos = start
        if found:
            return True
    return False
