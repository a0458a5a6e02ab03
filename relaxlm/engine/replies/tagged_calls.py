# ruff: noqa: RUF001, RUF002 (the marks of DeepSeek are spelled with a full-width bar)
"""Calls with marks around them: what may follow each mark.

Every reader is called behind the mark, and raises NotACall before it has passed on anything if no
call follows. A mark at the end may be missing.
"""

from collections.abc import Callable, Collection, Generator

from relaxlm.engine.replies.json_calls import calls, json_string, stream_object
from relaxlm.engine.replies.reader import NotACall, Reader, Wait
from relaxlm.engine.replies.sink import Sink

_ID_LENGTH = 9  # of Mistral's calls

DEEPSEEK_BEGIN = "<｜tool▁calls▁begin｜>"
DEEPSEEK_CALL = "<｜tool▁call▁begin｜>"
DEEPSEEK_SEP = "<｜tool▁sep｜>"
DEEPSEEK_CALL_END = "<｜tool▁call▁end｜>"
DEEPSEEK_END = "<｜tool▁calls▁end｜>"

KIMI_BEGIN = "<|tool_calls_section_begin|>"
KIMI_CALL = "<|tool_call_begin|>"
KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"
KIMI_CALL_END = "<|tool_call_end|>"
KIMI_END = "<|tool_calls_section_end|>"


def bare(reader: Reader, sink: Sink, mark: str, names: Collection[str]) -> Wait:
    """JSON in the middle of text: an object, objects with ";" between them, a list, or these in a
    fenced block. Only the functions of the request are called so: another name may as well be
    that of a thing in an answer.
    """
    if mark in "{[":
        reader.pos -= len(mark)
    yield from calls(reader, sink, names)
    if mark.startswith("```"):
        yield from reader.skip_after_space("```")


def named(reader: Reader, sink: Sink, name: str) -> Wait:
    """GLM 4: a line with the function's name, and the arguments."""
    yield from _object(reader, sink, name)


def by_name(reader: Reader, sink: Sink, end: str) -> Wait:
    """Apertus: [{"name": {..}}, ..], and the mark `end`."""
    yield from reader.skip_space()
    yield from reader.expect("[")
    yield from _named_object(reader, sink)
    while True:
        reader.forget()
        if (yield from reader.skip_after_space("]")):
            yield from reader.skip_after_space(end)
            return
        try:
            reader.check_patience()
            yield from reader.skip_space()
            yield from reader.expect(",")
            yield from _named_object(reader, sink)
        except NotACall:
            reader.back(0)
            return


def _named_object(reader: Reader, sink: Sink) -> Wait:
    yield from reader.skip_space()
    yield from reader.expect("{")
    yield from reader.skip_space()
    name = yield from json_string(reader)
    yield from reader.skip_space()
    yield from reader.expect(":")
    if not name:
        raise NotACall
    yield from _object(reader, sink, name)
    yield from reader.skip_after_space("}")


def hunyuan(reader: Reader, sink: Sink) -> Wait:
    """<tool_calls>[{"name": .., "arguments": ..}, ..]</tool_calls>, or for each call <tool_call>, a
    line with the function's name, and a fenced block of JSON.
    """
    yield from repeated(reader, "</tool_calls>", lambda: _hunyuan_call(reader, sink))


def _hunyuan_call(reader: Reader, sink: Sink) -> Wait:
    if not (yield from reader.skip_after_space("<tool_call>")):
        yield from calls(reader, sink)
        return
    name = yield from name_before(reader, "\n")
    yield from reader.skip_space()
    yield from reader.expect("```json")
    yield from _object(reader, sink, name)
    yield from reader.skip_after_space("```")
    yield from reader.skip_after_space("</tool_call>")


def python_tag(reader: Reader, sink: Sink) -> Wait:
    """<|python_tag|>{"name": .., "parameters": ..}; .."""
    yield from calls(reader, sink)


def in_tags(reader: Reader, sink: Sink, end: str) -> Wait:
    """<tool_call>{"name": .., "arguments": ..}</tool_call>, or a list of such objects."""
    yield from calls(reader, sink)
    yield from reader.skip_after_space(end)


def mistral(reader: Reader, sink: Sink) -> Wait:
    """[TOOL_CALLS] [{"name": .., "arguments": ..}, ..], or [TOOL_CALLS]name[ARGS]{..}; newer models
    write [CALL_ID] and nine characters behind the name.
    """
    yield from reader.skip_space()
    if (yield from reader.peek()) in ("[", "{"):
        yield from calls(reader, sink)
        return
    name = yield from name_before(reader, "[{ \n")
    call_id = None
    if (yield from reader.skip_after_space("[CALL_ID]")):
        yield from reader.skip_space()
        call_id = yield from name_before(reader, "[{ \n")
    yield from reader.skip_after_space("[ARGS]")
    known = call_id if call_id and len(call_id) == _ID_LENGTH else None
    yield from _object(reader, sink, name, known)


def deepseek(reader: Reader, sink: Sink) -> Wait:
    """<｜tool▁calls▁begin｜> and calls, each name<｜tool▁sep｜>{..}, or in R1's models
    function<｜tool▁sep｜>name, a line end and a fenced block of JSON.
    """
    yield from repeated(reader, DEEPSEEK_END, lambda: _deepseek_call(reader, sink))


def _deepseek_call(reader: Reader, sink: Sink) -> Wait:
    yield from reader.skip_space()
    yield from reader.expect(DEEPSEEK_CALL)
    name = yield from name_before(reader, "<")
    yield from reader.expect(DEEPSEEK_SEP)
    fenced = name == "function" and (yield from reader.peek()) != "{"
    if fenced:
        name = yield from name_before(reader, "\n")
        yield from reader.expect("\n```json\n")
    yield from _object(reader, sink, name)
    if fenced:
        yield from reader.skip_after_space("```")
    yield from reader.skip_after_space(DEEPSEEK_CALL_END)


def kimi(reader: Reader, sink: Sink) -> Wait:
    """<|tool_calls_section_begin|> and calls, each with its id in front, functions.NAME:0."""
    ids: set[str] = set()
    yield from repeated(reader, KIMI_END, lambda: _kimi_call(reader, sink, ids))


def _kimi_call(reader: Reader, sink: Sink, ids: set[str]) -> Wait:
    yield from reader.skip_space()
    yield from reader.expect(KIMI_CALL)
    yield from reader.skip_space()
    start = reader.pos
    name = yield from name_before(reader, ": <")
    if (yield from reader.skip(":")):
        yield from name_before(reader, " <")
    call_id = reader.text[start : reader.pos]
    yield from reader.skip_space()
    yield from reader.expect(KIMI_ARGUMENTS)
    # The template writes the id again, behind the call and above its result.
    known = None if call_id in ids else call_id
    ids.add(call_id)
    yield from _object(reader, sink, name.removeprefix("functions."), known)
    yield from reader.skip_after_space(KIMI_CALL_END)


def repeated(reader: Reader, end: str, read_call: Callable[[], Wait]) -> Wait:
    """One call or more, and the mark `end`.

    Raises:
        NotACall: there is no call.
    """
    yield from read_call()
    while True:
        reader.forget()
        if (yield from reader.skip_after_space(end)):
            return
        try:
            reader.check_patience()
            yield from read_call()
        except NotACall:
            reader.back(0)
            return


def cohere(reader: Reader, sink: Sink) -> Wait:
    """Action:, and a fenced block with a list of {"tool_name": .., "parameters": ..}."""
    yield from reader.skip_space()
    yield from reader.expect("```json")
    yield from calls(reader, sink)
    yield from reader.skip_after_space("```")


def function_tag(reader: Reader, sink: Sink) -> Wait:
    """<function=name>{..}</function>."""
    name = yield from name_before(reader, ">")
    yield from reader.expect(">")
    yield from _object(reader, sink, name)
    yield from reader.skip_after_space("</function>")


def _object(reader: Reader, sink: Sink, name: str, call_id: str | None = None) -> Wait:
    """A call with the object that follows as its arguments.

    Raises:
        NotACall: no object follows.
    """
    yield from reader.skip_space()
    if (yield from reader.peek()) != "{":
        raise NotACall
    sink.call(name, call_id)
    yield from stream_object(reader, sink)


def name_before(reader: Reader, ends: str) -> Generator[None, None, str]:
    """A name up to one of the characters `ends`, which is left where it is.

    Raises:
        NotACall: no name, or a character that no name has.
    """
    start = reader.pos
    while (char := (yield from reader.peek())) not in ends or not char:
        if not (char.isalnum() or (char and char in "_-.")):
            raise NotACall
        reader.pos += 1
    if reader.pos == start:
        raise NotACall
    return reader.text[start : reader.pos]
