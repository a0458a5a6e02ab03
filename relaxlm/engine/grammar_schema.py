"""JSON schemas inside grammars: what is taken, and what is refused by name.

llguidance knows most of JSON Schema 2020-12 and passes over keywords that it has never heard of.
Here each keyword is one that it honours, one that constrains nothing (titles, descriptions), or an
error. Its own departures from JSON Schema that a reply could be wrong by are errors too. Left:

- properties come in the order in which the schema names them, others behind them
- strings have no \\uXXXX escapes: characters stand for themselves, and control characters other
  than \\b \\f \\n \\r \\t cannot be written. (With such escapes a name could be spelled in a second
  way, which llguidance would take for another name.)
- between two parts of the text there may be nothing, one space, or one line break with an
  indentation of up to 24 spaces or tabs, so that no model is caught in white space; none before
  the text and behind it
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from relaxlm.errors import RequestError

_OPTIONS = {"whitespace_pattern": r" |\r?\n[ \t]{0,24}", "json_allowed_escapes": 'nrbtf\\"'}

_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SINGLE = ("items", "additionalItems", "additionalProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength")
_OTHERS = ("$ref", "const", "enum", "type", "required", "pattern", "format")
_HONOURED = frozenset((*_LISTS, *_MAPS, *_SINGLE, *_NUMBERS, *_COUNTS, *_OTHERS))
_ABOUT = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly")
_ANNOTATIONS = frozenset((*_ABOUT, "$comment", "contentMediaType", "contentEncoding"))
_ROOT_ANNOTATIONS = frozenset(("$schema", "$id"))
_DRAFTS = "json-schema.org/"
_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)

# llguidance takes time by their square for the first three, and has a stack for the last.
OPTIONAL_LIMIT = 400
PATTERN_PROPERTIES_LIMIT = 64
PATTERN_LIMIT_CHARACTERS = 4096
SUBSCHEMA_LIMIT = 10_000
DEPTH_LIMIT = 48


def json_rule(schema: Any, lenient: bool = False) -> str:
    """What stands in a lark grammar for JSON text that fits a schema.

        start: "answer: " %json {"type": "integer", …}

    Args:
        lenient: leave out what is not supported instead of refusing it.

    Raises:
        RequestError: not a schema, or not one that is supported; names the keyword.
    """
    return SchemaCheck(lenient).rule(schema)


def parse_json(source: str, what: str) -> Any:
    """JSON that a request gives as text.

    Raises:
        RequestError: not JSON.
    """
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as reason:
        raise RequestError(f"{what}: not JSON: {reason}") from None


class SchemaCheck:
    """Goes over one schema. `pattern_characters` tells afterwards how long its patterns are."""

    def __init__(self, lenient: bool = False) -> None:
        self.pattern_characters = 0
        self._lenient = lenient
        self._places: set[str] = set()
        self._references: list[tuple[str, str]] = []

    def rule(self, schema: Any) -> str:
        """See `json_rule`."""
        if not isinstance(schema, dict):
            raise RequestError(f"JSON schema: expected an object, found {_text(schema)}")
        options: dict[str, Any] = {**_OPTIONS, "lenient": True} if self._lenient else _OPTIONS
        return "%json " + json.dumps({**self._root(schema), "x-guidance": options})

    def _root(self, schema: dict[str, Any]) -> dict[str, Any]:
        dialect = schema.get("$schema", _DRAFTS)
        if not isinstance(dialect, str) or _DRAFTS not in dialect:
            raise _error("#", "$schema", f"{_text(dialect)} is no dialect of JSON Schema")
        kept = {key: value for key, value in schema.items() if key not in _ROOT_ANNOTATIONS}
        result = self._object(kept, "#", 0)
        for place, target in self._references:
            if _normal(target) not in self._places:
                raise _error(place, "$ref", f"no schema at {target!r} in this one")
        return result

    def _schema(self, schema: Any, place: str, depth: int) -> dict[str, Any] | bool:
        if isinstance(schema, bool):
            self._places.add(place)
            return schema
        if not isinstance(schema, dict):
            raise RequestError(
                f"JSON schema, {place}: expected an object or a boolean, found {_text(schema)}"
            )
        return self._object(schema, place, depth)

    def _object(self, schema: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        self._places.add(place)
        if len(self._places) > SUBSCHEMA_LIMIT:
            raise RequestError(f"JSON schema: more than {SUBSCHEMA_LIMIT} schemas in it")
        if depth > DEPTH_LIMIT:
            raise RequestError(f"JSON schema, {place}: nested deeper than {DEPTH_LIMIT} schemas")
        result: dict[str, Any] = {}
        for keyword, value in schema.items():
            if keyword in _ANNOTATIONS:
                continue
            if keyword not in _HONOURED:
                if self._lenient:
                    continue
                raise _error(place, keyword, "not supported")
            if self._lenient and keyword == "format" and not _is_format(value):
                continue
            self._keyword(schema, keyword, value, place)
            result[keyword] = self._inside(keyword, value, f"{place}/{_escaped(keyword)}", depth)
        return result

    def _inside(self, keyword: str, value: Any, place: str, depth: int) -> Any:
        if keyword in _MAPS:
            if not isinstance(value, dict):
                raise RequestError(f"JSON schema, {place}: expected an object")
            return {
                name: self._schema(inner, f"{place}/{_escaped(name)}", depth + 1)
                for name, inner in value.items()
            }
        if keyword in _LISTS or (keyword == "items" and isinstance(value, list)):
            if not isinstance(value, list) or not value:
                raise RequestError(f"JSON schema, {place}: expected a list that is not empty")
            return [self._schema(inner, f"{place}/{i}", depth + 1) for i, inner in enumerate(value)]
        return self._schema(value, place, depth + 1) if keyword in _SINGLE else value

    def _keyword(self, schema: dict[str, Any], keyword: str, value: Any, place: str) -> None:
        """Refuse values that llguidance takes for something else, or at any length of time."""
        if keyword == "$ref":
            if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
                raise _error(
                    place, keyword, f"{_text(value)} is outside of the schema; nothing is read"
                )
            self._references.append((place, value))
        elif keyword in _NUMBERS:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise _error(place, keyword, f"expected a number, found {_text(value)}")
            _check_number(value, place, keyword)
        elif keyword in ("const", "enum"):
            for leaf in _leaves(value):
                _check_number(leaf, place, keyword)
        elif keyword == "format":
            if not _is_format(value):
                known = ", ".join(sorted(_FORMATS))
                raise _error(place, keyword, f"{_text(value)} is not one of {known}")
        elif keyword == "pattern":
            self._add_pattern(value)
        elif keyword == "additionalItems" and not isinstance(schema.get("items"), list):
            # llguidance would pass over prefixItems beside it.
            raise _error(place, keyword, "only beside a list of items; write items and prefixItems")
        elif keyword == "patternProperties" and isinstance(value, dict):
            if len(value) > PATTERN_PROPERTIES_LIMIT:
                raise _error(place, keyword, f"more than {PATTERN_PROPERTIES_LIMIT} patterns")
            for pattern in value:
                self._add_pattern(pattern)
        elif keyword == "properties" and isinstance(value, dict):
            required = _names(schema)
            optional = sum(name not in required for name in value)
            if optional > OPTIONAL_LIMIT:
                raise _error(
                    place,
                    keyword,
                    f"{optional} that are not required, at most {OPTIONAL_LIMIT} are taken",
                )
        elif keyword == "minProperties" and isinstance(value, int):
            # A name that stands twice in an object counts once, but the grammar counts it twice.
            if value > len(_names(schema)) + 1 and not self._lenient:
                raise _error(
                    place, keyword, "at most one more than there are required properties is taken"
                )

    def _add_pattern(self, pattern: Any) -> None:
        self.pattern_characters += len(pattern) if isinstance(pattern, str) else 0
        if self.pattern_characters > PATTERN_LIMIT_CHARACTERS:
            raise RequestError(
                "JSON schema: its patterns have more than "
                f"{PATTERN_LIMIT_CHARACTERS} characters together"
            )


def _is_format(value: Any) -> bool:
    return isinstance(value, str) and value in _FORMATS


def _names(schema: dict[str, Any]) -> set[str]:
    required = schema.get("required")
    return (
        {name for name in required if isinstance(name, str)}
        if isinstance(required, list)
        else set()
    )


def _leaves(value: Any) -> Iterator[Any]:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list):
            pending += item
        else:
            yield item


def _check_number(value: Any, place: str, keyword: str) -> None:
    """llguidance computes in float64."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    try:
        exact = math.isfinite(value) and float(value) == value
    except OverflowError:
        exact = False
    if not exact:
        raise _error(place, keyword, f"{_text(value)} is no number that float64 holds exactly")


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _normal(pointer: str) -> str:
    """A pointer as `_escaped` spells it."""
    parts = unquote(pointer).split("/")
    return "/".join(_escaped(part.replace("~1", "/").replace("~0", "~")) for part in parts)


def _text(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:60] + " …"


def _error(place: str, keyword: str, what: str) -> RequestError:
    return RequestError(f"JSON schema, {place}: {keyword}: {what}")
