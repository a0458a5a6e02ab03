"""Calls written as in Python: [get_weather(city="Paris", days=3), stop()] in LFM2's marks, or a
line for each in OLMo 3's.

Values are literals of Python or of JSON. Some models put strings between quotes without escaping
what is in them, so a string ends with a quote behind which the argument ends.
"""

import ast
import json
from collections.abc import Generator

from relaxlm.engine.replies.json_calls import calls
from relaxlm.engine.replies.reader import NotACall, Reader, Wait
from relaxlm.engine.replies.sink import Sink
from relaxlm.engine.replies.tagged_calls import name_before

_WORDS = {"true": "true", "false": "false", "null": "null"}


def python_calls(reader: Reader, sink: Sink, end: str) -> Wait:
    """Behind the mark: calls, as JSON or as Python, in brackets or not, and the mark `end`."""
    yield from reader.skip_space()
    start = reader.pos
    listed = yield from reader.skip("[")
    yield from reader.skip_space()
    if (yield from reader.peek()) == "{":
        reader.pos = start
        yield from calls(reader, sink)
        yield from reader.skip_after_space(end)
        return
    yield from _call(reader, sink)
    while True:
        reader.forget()
        ended = listed and (yield from reader.skip_after_space("]"))
        if (yield from reader.skip_after_space(end)) or ended:
            return
        try:
            reader.check_patience()
            yield from reader.skip_space()
            if not (yield from reader.skip(",")) and listed:
                raise NotACall
            yield from reader.skip_space()
            yield from _call(reader, sink)
        except NotACall:
            reader.back(0)
            return


def _call(reader: Reader, sink: Sink) -> Wait:
    """
    Raises:
        NotACall: before anything was passed on.
    """
    name = yield from name_before(reader, "(")
    yield from reader.expect("(")
    yield from reader.skip_space()
    if (yield from reader.skip(")")):
        sink.call(name)
        sink.arguments("{}")
        return
    separator = "{"
    while True:
        key = yield from _key(reader)
        if key is None:
            if separator == "{":
                raise NotACall
            return  # what follows is no argument; the call ends here, without its last brace
        if separator == "{":
            sink.call(name)
        sink.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        separator = ", "
        reader.forget()
        if not (yield from _past_value(reader)):
            sink.arguments(_begun(reader.text[: reader.pos]))
            return  # the reply ends here, and so do the arguments
        sink.arguments(as_json(reader.text[: reader.pos]))
        reader.forget()
        yield from reader.skip_space()
        if (yield from reader.skip(")")):
            sink.arguments("}")
            return
        yield from reader.skip(",")
        yield from reader.skip_space()


def _key(reader: Reader) -> Generator[None, None, str | None]:
    start = reader.pos
    try:
        key = yield from name_before(reader, "= ")
        yield from reader.skip_space()
        yield from reader.expect("=")
    except NotACall:
        reader.back(start)
        return None
    yield from reader.skip_space()
    return key


def _past_value(reader: Reader) -> Generator[None, None, bool]:
    """Go past an argument; False if the reply ends within it."""
    quote = yield from reader.peek()
    if quote and quote in "'\"":
        return (yield from _past_string(reader, quote))
    depth = 0
    while depth or (yield from reader.peek()) not in (",", ")"):
        char = yield from reader.peek()
        if not char:
            return False
        if char in "'\"":
            if not (yield from _past_string(reader, char)):
                return False
            continue
        depth += (char in "([{") - (char in ")]}")
        reader.pos += 1
    return True


def _past_string(reader: Reader, quote: str) -> Generator[None, None, bool]:
    """Go past a string; False if the reply ends within it."""
    reader.pos += 1
    while char := (yield from reader.peek()):
        reader.pos += 1
        if char == "\\":
            if not (yield from reader.peek()):
                return False
            reader.pos += 1
        elif char == quote:
            end = reader.pos
            yield from reader.skip_space()
            after = yield from reader.peek()
            reader.pos = end
            if after in (",", ")", "]", "}", ":"):
                return True
            if not after:
                return False
    return False


def _begun(text: str) -> str:
    """The text of an argument that is cut off."""
    if text[:1] not in ("'", '"'):
        return text
    return json.dumps(text[1:], ensure_ascii=False)[:-1]


def as_json(text: str) -> str:
    """A literal of Python or JSON, as JSON; other text as a string."""
    text = text.strip()
    if text in _WORDS:
        return _WORDS[text]
    # JSON first: its strings may have halves of characters, which are no text in Python's.
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
            found = json.dumps(value, ensure_ascii=False, allow_nan=False)
            return found if _is_text(found) else json.dumps(value)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]:
        text = text[1:-1]
    return json.dumps(text, ensure_ascii=False)


def _is_text(text: str) -> bool:
    """Whether no character is half of one."""
    return not any("\ud800" <= char <= "\udfff" for char in text)
