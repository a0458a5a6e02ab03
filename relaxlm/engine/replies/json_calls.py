"""Calls that a model writes as JSON: {"name": .., "arguments": {..}}, alone, in a list or in tags.

A call is passed on as soon as its name is known and its arguments have begun, and its arguments
while they arrive. From there on it stays a call whatever follows; before, anything unexpected
makes it content.
"""

import json
from collections.abc import Collection, Generator
from dataclasses import dataclass

from relaxlm.engine.replies.reader import NotACall, Reader, Wait
from relaxlm.engine.replies.sink import Sink

NAME_KEYS = ("name", "tool_name")
ARGUMENTS_KEYS = ("arguments", "parameters")
# What models write beside these two in an object that is a call even without any mark around it.
KNOWN_KEYS = frozenset({*NAME_KEYS, *ARGUMENTS_KEYS, "type", "id", "function"})


@dataclass
class _Found:
    """What the members of a call's object have told so far."""

    name: str | None = None
    arguments: str | None = None
    begun: bool = False
    nested: bool = False  # the members are those of "function" in an outer object


def calls(reader: Reader, sink: Sink, names: Collection[str] | None = None) -> Wait:
    """One call, several with "," or ";" between them, or a list of calls.

    Args:
        names: the only names that make an object a call, for objects without a mark around them;
            None if there is a mark.

    Raises:
        NotACall: before anything was passed on.
    """
    yield from reader.skip_space()
    listed = yield from reader.skip("[")
    if listed:
        yield from reader.skip_space()
    yield from call(reader, sink, names)
    while True:
        start = _hold(reader)
        if listed and (yield from reader.skip_after_space("]")):
            return
        yield from reader.skip_space()
        if not ((yield from reader.skip(",")) or (yield from reader.skip(";"))):
            reader.pos = start
            return
        try:
            reader.check_patience()
            yield from call(reader, sink, names)
        except NotACall:
            reader.back(start)
            return


def _hold(reader: Reader) -> int:
    reader.forget()
    return reader.pos


def call(reader: Reader, sink: Sink, names: Collection[str] | None = None) -> Wait:
    """One object.

    Raises:
        NotACall: before anything was passed on.
    """
    found = _Found()
    yield from reader.skip_space()
    yield from _members(reader, sink, found, names)
    if found.begun:
        return
    if found.name is None or (found.arguments is None and names is not None):
        raise NotACall
    _begin(sink, found, names)
    sink.arguments("{}" if found.arguments is None else found.arguments)


def _members(
    reader: Reader, sink: Sink, found: _Found, names: Collection[str] | None
) -> Generator[None, None, None]:
    yield from reader.expect("{")
    while True:
        start = reader.pos
        try:
            yield from reader.skip_space()
            key = yield from json_string(reader)
            yield from reader.skip_space()
            yield from reader.expect(":")
            yield from reader.skip_space()
            yield from _member(reader, sink, found, names, key)
            start = reader.pos
            yield from reader.skip_space()
            if (yield from reader.skip("}")):
                return
            yield from reader.expect(",")
        except NotACall:
            if not found.begun:
                raise
            # A call that lacks its last brace is a call nevertheless.
            reader.back(start)
            return


def _member(
    reader: Reader, sink: Sink, found: _Found, names: Collection[str] | None, key: str
) -> Wait:
    if names is not None and key not in KNOWN_KEYS:
        raise NotACall
    if found.begun:
        yield from json_value(reader)
    elif key in NAME_KEYS and found.name is None:
        found.name = yield from json_string(reader)
        if not found.name or (names is not None and found.name not in names):
            raise NotACall
        if found.arguments is not None:
            _begin(sink, found, names)
            sink.arguments(found.arguments)
    elif key in ARGUMENTS_KEYS and found.arguments is None:
        if (yield from reader.peek()) == "{" and found.name is not None:
            _begin(sink, found, names)
            yield from stream_object(reader, sink)
        else:
            found.arguments = _as_object((yield from json_value(reader)))
            if found.name is not None:
                _begin(sink, found, names)
                sink.arguments(found.arguments)
    elif key == "function" and not found.nested and (yield from reader.peek()) == "{":
        found.nested = True
        yield from _members(reader, sink, found, names)
    else:
        yield from json_value(reader)


def _begin(sink: Sink, found: _Found, names: Collection[str] | None) -> None:
    assert found.name is not None
    found.begun = True
    sink.call(found.name)


def _as_object(text: str) -> str:
    """Arguments that are no object: none at all, or an object in a string."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise NotACall from None
    if isinstance(value, str):
        try:
            if isinstance(json.loads(value), dict):
                return value
        except (ValueError, RecursionError):
            raise NotACall from None
    if isinstance(value, dict):
        return text
    if value is None:
        return "{}"
    raise NotACall


# Values. Only strings and brackets are looked at, so that a mistake inside of arguments is left to
# whoever reads them.


def json_string(reader: Reader) -> Generator[None, None, str]:
    """The value of a string that begins here.

    Raises:
        NotACall: no string, or one that does not end.
    """
    start = reader.pos
    yield from reader.expect('"')
    while True:
        char = yield from reader.peek()
        if not char or char == "\n":
            raise NotACall
        reader.pos += 1
        if char == "\\":
            if not (yield from reader.peek()):
                raise NotACall
            reader.pos += 1
        elif char == '"':
            try:
                return json.loads(reader.text[start : reader.pos])
            except ValueError:
                raise NotACall from None


def json_value(reader: Reader) -> Generator[None, None, str]:
    """The text of a whole value.

    Raises:
        NotACall: no value, or one that does not end.
    """
    start = reader.pos
    char = yield from reader.peek()
    if char == '"':
        yield from json_string(reader)
    elif char and char in "{[":
        balance = Balance()
        while not balance.closed:
            if not (yield from reader.peek()):
                raise NotACall
            reader.pos = balance.advance(reader.text, reader.pos)
    else:
        while (char := (yield from reader.peek())) and (char.isalnum() or char in "+-."):
            reader.pos += 1
        if reader.pos == start:
            raise NotACall
    return reader.text[start : reader.pos]


def stream_object(reader: Reader, sink: Sink) -> Wait:
    """Pass on the text of an object as arguments, up to its last brace or the end of the text."""
    balance = Balance()
    while not balance.closed:
        reader.forget()
        if not (yield from reader.peek()):
            return
        end = balance.advance(reader.text, reader.pos)
        sink.arguments(reader.text[reader.pos : end])
        reader.pos = end


class Balance:
    """Finds the end of a value in brackets, in text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.closed = False

    def advance(self, text: str, start: int) -> int:
        """Where the value ends in `text`, or the text itself."""
        for at in range(start, len(text)):
            char = text[at]
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.closed = True
                    return at + 1
        return len(text)
