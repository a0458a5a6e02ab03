"""Calls whose arguments are written one by one in tags, and not as JSON.

    Qwen3-Coder                            GLM 4.5
    <tool_call>                            <tool_call>get_weather
    <function=get_weather>                 <arg_key>city</arg_key>
    <parameter=city>                       <arg_value>Paris</arg_value>
    Paris                                  </tool_call>
    </parameter>
    </function>
    </tool_call>

    Seed-OSS writes as Qwen3-Coder does, but <seed:tool_call>, and no line ends around values.

    MiniMax M2
    <minimax:tool_call>
    <invoke name="get_weather">
    <parameter name="city">Paris</parameter>
    </invoke>
    </minimax:tool_call>

Nothing in the text tells a string from another value: the function's schema does. A value that the
schema does not know is a string; one that should be none, but is no JSON, is a string too.
"""

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relaxlm.engine.replies.reader import Reader, Wait
from relaxlm.engine.replies.sink import Sink
from relaxlm.engine.replies.tagged_calls import name_before, repeated
from relaxlm.engine.replies.tools import Function


@dataclass(frozen=True)
class ArgumentTags:
    """key_begin KEY key_end value_begin VALUE, one of value_ends; `end` behind the last argument.

    Without value_begin a value begins behind key_end and a line end; "" means at once.
    """

    key_begin: str
    key_end: str
    value_begin: str | None
    value_ends: tuple[str, ...]
    end: str


QWEN = ArgumentTags("<parameter=", ">", None, ("\n</parameter>", "</parameter>"), "</function>")
SEED = ArgumentTags("<parameter=", ">", "", ("</parameter>",), "</function>")
MINIMAX = ArgumentTags('<parameter name="', '">', "", ("</parameter>",), "</invoke>")
MINIMAX_BEGIN, MINIMAX_END = "<minimax:tool_call>", "</minimax:tool_call>"
GLM = ArgumentTags("<arg_key>", "</arg_key>", "<arg_value>", ("</arg_value>",), "</tool_call>")


def qwen_call(reader: Reader, sink: Sink, functions: Sequence[Function]) -> Wait:
    """Behind "<function="."""
    name = yield from name_before(reader, ">")
    yield from reader.expect(">")
    yield from _arguments(reader, sink, QWEN, name, functions)


def glm_call(reader: Reader, sink: Sink, functions: Sequence[Function]) -> Wait:
    """Behind "<tool_call>"."""
    yield from reader.skip_space()
    name = yield from name_before(reader, "< \t\r\n")
    yield from _arguments(reader, sink, GLM, name, functions)


def seed_call(reader: Reader, sink: Sink, functions: Sequence[Function]) -> Wait:
    """Behind "<seed:tool_call>"."""
    yield from reader.skip_space()
    yield from reader.expect("<function=")
    name = yield from name_before(reader, ">")
    yield from reader.expect(">")
    yield from _arguments(reader, sink, SEED, name, functions)
    yield from reader.skip_after_space("</seed:tool_call>")


def minimax_calls(reader: Reader, sink: Sink, functions: Sequence[Function]) -> Wait:
    """Behind "<minimax:tool_call>"."""
    yield from repeated(reader, MINIMAX_END, lambda: _invoke(reader, sink, functions))


def _invoke(reader: Reader, sink: Sink, functions: Sequence[Function]) -> Wait:
    yield from reader.skip_space()
    yield from reader.expect('<invoke name="')
    name = yield from name_before(reader, '"')
    yield from reader.expect('">')
    yield from _arguments(reader, sink, MINIMAX, name, functions)


def _arguments(
    reader: Reader, sink: Sink, tags: ArgumentTags, name: str, functions: Sequence[Function]
) -> Wait:
    another = yield from reader.skip_after_space(tags.key_begin)
    if not another:
        yield from reader.skip_space()
        yield from reader.expect(tags.end)
    sink.call(name)
    separator = "{"
    while another:
        reader.forget()
        key = yield from _past(reader, tags.key_end)
        if key is None:
            return  # the reply ends here, and so do the arguments
        sink.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        separator = ", "
        if tags.value_begin is None:
            yield from reader.skip("\n")
        elif (yield from _past(reader, tags.value_begin)) is None:
            return
        if not (yield from _value(reader, sink, tags, value_types(name, key, functions))):
            return
        another = yield from reader.skip_after_space(tags.key_begin)
    sink.arguments("}" if separator == ", " else "{}")
    yield from reader.skip_after_space(tags.end)


def _past(reader: Reader, mark: str) -> Generator[None, None, str | None]:
    """The text up to a mark, which is gone past; None if the reply ends before."""
    text = ""
    while True:
        before, found = yield from reader.until([mark])
        text += before
        if found is not None:
            return text
        if not before:
            return None


def _value(
    reader: Reader, sink: Sink, tags: ArgumentTags, types: frozenset[str]
) -> Generator[None, None, bool]:
    """Pass on a value; False if the reply ends within it."""
    streamed = types == {"string"}
    if streamed:
        sink.arguments('"')
    parts: list[str] = []
    while True:
        before, mark = yield from reader.until(tags.value_ends)
        if streamed:
            sink.arguments(json.dumps(before, ensure_ascii=False)[1:-1])
        else:
            parts.append(before)
        if mark is not None:
            break
        if not before:
            if parts and (text := "".join(parts).strip()):
                sink.arguments(text)
            return False
    sink.arguments('"' if streamed else _typed("".join(parts), types))
    return True


def _typed(text: str, types: frozenset[str]) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if "string" in types and json_type(value) not in types:
        return json.dumps(text, ensure_ascii=False)
    return text.strip()


def json_type(value: object) -> str:
    """The name that JSON schemas have for a value's type; "number" for integers too."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def value_types(name: str, key: str, functions: Sequence[Function]) -> frozenset[str]:
    """The types that a function's schema gives an argument."""
    schema = next((f.parameters for f in functions if f.name == name), None)
    properties = schema.get("properties") if schema is not None else None
    if schema is None or not isinstance(properties, Mapping) or key not in properties:
        return frozenset({"string"})
    found = _types(properties[key], schema, depth=0)
    return frozenset(found) or frozenset({"string"})


_DEEPEST = 16  # of references in references


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> set[str]:
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return set()
    given = schema.get("type")
    if given is not None:
        names = given if isinstance(given, list) else [given]
        return {"number" if name == "integer" else str(name) for name in names}
    if "const" in schema:
        return {json_type(schema["const"])}
    if isinstance(schema.get("enum"), list):
        return {json_type(value) for value in schema["enum"]}
    reference = schema.get("$ref")
    if isinstance(reference, str):
        return _types(_target(reference, root), root, depth + 1)
    found: set[str] = set()
    for key in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(key)
        for part in parts if isinstance(parts, list) else ():
            found |= _types(part, root, depth + 1)
    return found


def _target(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference inside of the same schema ("#/$defs/city") points to."""
    target: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        target = target.get(part) if isinstance(target, Mapping) else None
    return target
