"""Arguments one by one in tags, as rules of a grammar: see xml_calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from relaxlm.engine.grammar_schema import json_rule
from relaxlm.engine.grammar_source import literal
from relaxlm.engine.replies.tools import Function
from relaxlm.engine.replies.xml_calls import value_types
from relaxlm.errors import RequestError

if TYPE_CHECKING:
    from relaxlm.engine.replies.grammar import Rules

Style = Literal["qwen", "seed", "glm", "minimax"]

# What stands around a key, and around its value.
_TAGS = {
    "qwen": ("<parameter=", ">\n", "\n</parameter>", "\n"),
    "seed": ("<parameter=", ">", "</parameter>", "\n"),
    "minimax": ('<parameter name="', '">', "</parameter>", "\n"),
    "glm": ("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>", "\n"),
}
_DEFINITIONS = ("$defs", "definitions")
# Between tags a string is written as it is, and a grammar would have to follow the schema and the
# tag's end at once.
_STRING_LIMITS = ("pattern", "format", "minLength", "maxLength")


def tagged_arguments(rules: Rules, function: Function, i: int, style: Style) -> str:
    """All arguments of function number `i`, in the order of its schema.

    Raises:
        RequestError: a strict function with a limit on a string.
    """
    schema = function.parameters
    properties = schema.get("properties") or {}
    if not properties and schema.get("additionalProperties", True) is not False:
        before, between, after, end = _TAGS[style]
        value = rules.up_to(after, f"any_value_{i}")
        key = "/[a-zA-Z0-9_.-]{1,64}/"
        return f"({rules.text(before)} {key} {rules.text(between)} {value} {rules.text(end)})*"
    required = schema.get("required") or []
    parts = []
    for n, key in enumerate(properties):
        argument = _argument(rules, function, key, f"{i}_{n}", style)
        parts.append(f"({argument}){'' if key in required else '?'}")
    return rules.add(f"arguments_{i}", " ".join(parts))


def _argument(rules: Rules, function: Function, key: str, name: str, style: Style) -> str:
    before, between, after, end = _TAGS[style]
    schema = function.parameters["properties"][key]
    types = value_types(function.name, key, [function])
    value: str
    if "string" not in types:
        rule = rules.add(
            f"value_{name}", json_rule(alone(schema, function.parameters), not function.strict)
        )
        value = f"{rule} {rules.text(after)}"
    elif texts := _texts(schema):
        value = f"({' | '.join(literal(text) for text in texts)}) {rules.text(after)}"
    else:
        limits = [limit for limit in _STRING_LIMITS if _has(schema, limit)]
        if function.strict and limits:
            raise RequestError(
                f"function {function.name!r} is strict and its argument {key!r} has a "
                f"{limits[0]}, which this model's format of tool calls cannot keep to: leave out "
                "one of them"
            )
        value = rules.up_to(after, f"value_{name}")
    return f"{rules.text(before + key + between)} {value} {rules.text(end)}"


def _has(schema: Any, limit: str) -> bool:
    return isinstance(schema, Mapping) and limit in schema


def _texts(schema: Any) -> list[str]:
    """The values of a string that has few; none if it may be any."""
    if not isinstance(schema, Mapping):
        return []
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list):
        return []
    return [value if isinstance(value, str) else json.dumps(value) for value in values]


def alone(schema: Any, root: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a schema with what it may refer to."""
    if not isinstance(schema, Mapping):
        schema = {}
    return {**{key: root[key] for key in _DEFINITIONS if key in root}, **schema}
