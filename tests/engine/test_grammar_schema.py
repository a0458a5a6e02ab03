import json
import random
import re
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relaxlm.engine.grammar_schema import json_rule
from relaxlm.errors import RequestError
from tests.engine.grammars import byte_level, compiled, matches, walk

NAMES = ["a", "b", "the", "größe", 'q"\\']
_texts = st.text(st.sampled_from('ab"\\é🙂\n'), max_size=3)


def _bounds(low: str, high: str, most: int) -> st.SearchStrategy[dict[str, int]]:
    pairs = st.tuples(st.integers(0, most), st.integers(0, most)).map(sorted)
    return pairs.flatmap(
        lambda pair: st.sampled_from(
            [{}, {low: pair[0]}, {high: pair[1]}, {low: pair[0], high: pair[1]}]
        )
    )


_numbers = st.sampled_from(
    [
        {"type": "integer", "minimum": -12, "maximum": 103},
        {"type": "integer", "exclusiveMinimum": 7, "exclusiveMaximum": 40},
        {"type": "number", "minimum": -0.25, "exclusiveMaximum": 3.5},
        {"type": "integer", "multipleOf": 6, "minimum": 0, "maximum": 500},
    ]
)
_leaves = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    _numbers,
    _bounds("minLength", "maxLength", 4).map(
        lambda bounds: {"type": "string", "maxLength": 6} | bounds
    ),
    st.sampled_from(
        [
            {"type": "string", "pattern": "^a[bé]{1,3}$"},
            {"type": "string", "pattern": "[ab]\\d$", "maxLength": 4},
            {"const": {"a": [1, None, "é"]}},
            {"enum": ["the", 7, 2.5, None, True, [], {}]},
            {"enum": ["the", "a", 3], "type": "string"},
        ]
    ),
)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "type": st.just("object"),
            "properties": st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
            "required": st.lists(st.sampled_from(NAMES), unique=True, max_size=3),
            "additionalProperties": st.just({"type": "integer", "minimum": 0, "maximum": 99}),
        }
    ).flatmap(
        lambda schema: st.sampled_from(
            [
                schema,
                schema | {"additionalProperties": False, "required": [*schema["properties"]]},
                schema | {"additionalProperties": False, "required": []},
            ]
        )
    )


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.tuples(_bounds("minItems", "maxItems", 3), inner).map(
        lambda parts: {"type": "array", "items": parts[1]} | parts[0]
    )
    tuples = st.lists(inner, min_size=1, max_size=2).map(
        lambda items: {"type": "array", "prefixItems": items, "items": False}
    )
    unions = st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options})
    return st.one_of(arrays, tuples, unions, _objects(inner))


_schemas = st.recursive(_leaves, _containers, max_leaves=6)
_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-15, 110), st.just(2.5), _texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(_schemas, st.integers(0, 2**32))
def test_what_a_grammar_allows_fits_the_schema(schema: dict[str, Any], seed: int) -> None:
    text = walk(compiled("json_schema", schema), byte_level(), random.Random(seed))
    if text is not None:
        assert jsonschema_rs.validator_for(schema).is_valid(json.loads(text)), text


@settings(max_examples=150, deadline=None)
@given(_schemas, _values)
def test_what_fits_the_schema_is_allowed(schema: dict[str, Any], value: Any) -> None:
    """As json.dumps writes it, in lines or in one, if the properties are in the schema's order."""
    grammar = compiled("json_schema", {"items": schema, "type": "array"})
    for layout in ({}, {"indent": 2}, {"separators": (",", ":")}):
        value = _ordered(value, schema)
        text = json.dumps([value], ensure_ascii=False, **layout)
        assert matches(grammar, text) == jsonschema_rs.validator_for(schema).is_valid(value), text


def _ordered(value: Any, schema: Any) -> Any:
    """A value with its properties in the order that any part of the schema gives them."""
    order: list[str] = []

    def collect(part: Any) -> None:
        if isinstance(part, dict):
            order.extend(part.get("properties", {}))
            order.extend(part.get("required", []))
            for inner in part.values():
                collect(inner)
        elif isinstance(part, list):
            for inner in part:
                collect(inner)

    collect(schema)

    def sort(item: Any) -> Any:
        if isinstance(item, list):
            return [sort(inner) for inner in item]
        if isinstance(item, dict):
            names = sorted(
                item, key=lambda name: order.index(name) if name in order else len(order)
            )
            return {name: sort(item[name]) for name in names}
        return item

    return sort(value)


def test_a_json_object_is_any_object() -> None:
    grammar = compiled("json_object")
    rng = random.Random(5)
    found = [walk(grammar, byte_level(), rng) for _ in range(30)]
    assert sum(text is not None for text in found) > 10
    assert all(isinstance(json.loads(text), dict) for text in found if text is not None)
    assert matches(grammar, '{"a": [1.5e3, null, {"b": "\\n\\\\é"}]}')
    for text in ("[]", "1", "{", '{"a":}', " {}", "{} "):
        assert not matches(grammar, text)


def test_white_space_has_bounds() -> None:
    grammar = compiled("json_schema", {"type": "array", "items": {"type": "integer"}})
    for text in (
        "[1,2]",
        "[1, 2]",
        "[ 1 , 2 ]",
        "[\n  1,\n  2\n]",
        "[\r\n\t\t1]",
        "[\n" + " " * 24 + "1]",
    ):
        assert matches(grammar, text), text
    for text in (
        "[  1]",
        "[\t1]",
        "[\n\n1]",
        "[\n" + " " * 25 + "1]",
        "[ \n1]",
        "\n[]",
        "[]\n",
        "[1\r]",
    ):
        assert not matches(grammar, text), text


def test_strings_are_written_in_one_way_only() -> None:
    """A name in other letters would be taken for another name."""
    schema = {"properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar = compiled("json_schema", {"type": "object", **schema})
    assert matches(grammar, '{"a": 1, "b": "x"}')
    assert not matches(grammar, '{"a": 1, "\\u0061": "x"}')
    text = compiled("json_schema", {"type": "string"})
    assert matches(text, r'"\n\t\"\\é"') and not matches(text, r'"\u00e9"')


def test_references_inside_of_the_schema() -> None:
    tree = {
        "$id": "https://example.com/tree",
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": "#/$defs/a~1b%20c",
        "$defs": {
            "a/b c": {
                "type": "object",
                "properties": {"next": {"$ref": "#/$defs/a~1b%20c"}},
                "additionalProperties": False,
                "title": "left out",
            }
        },
    }
    grammar = compiled("json_schema", tree)
    assert matches(grammar, '{"next": {"next": {}}}') and not matches(grammar, '{"next": 1}')


REFUSED = [
    ({"not": {}}, "#: not: not supported"),
    ({"properties": {"a": {"items": {"uniqueItems": True}}}}, "#/properties/a/items: uniqueItems"),
    ({"$defs": {"x": {"if": {}}}}, "#/$defs/x: if: not supported"),
    ({"contains": {}}, "#: contains: not supported"),
    ({"dependencies": {}}, "#: dependencies: not supported"),
    ({"properties": {"a": {"nullable": True}}}, "#/properties/a: nullable: not supported"),
    ({"minimun": 1}, "#: minimun: not supported"),
    ({"$dynamicRef": "#a"}, "#: $dynamicRef: not supported"),
    ({"items": {"$id": "x"}}, "#/items: $id: not supported"),
    ({"x-guidance": {"lenient": True}}, "#: x-guidance: not supported"),
    ({"$schema": "https://example.com/mine"}, "#: $schema: "),
    (
        {"$ref": "http://127.0.0.1:9/schema"},
        '$ref: "http://127.0.0.1:9/schema" is outside of the schema; nothing is read',
    ),
    ({"$ref": "file:///etc/passwd"}, '$ref: "file:///etc/passwd" is outside of the schema'),
    ({"$ref": "other.json#/a"}, "is outside of the schema"),
    ({"$ref": "#/$defs/none"}, "$ref: no schema at '#/$defs/none' in this one"),
    ({"$ref": "#/properties", "properties": {"type": {}}}, "$ref: no schema at '#/properties'"),
    ({"$ref": 3}, "$ref: 3 is outside"),
    ({"format": "int32", "type": "integer"}, 'format: "int32" is not one of date, date-time'),
    ({"format": []}, "format: [] is not one of"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf: not supported if two"),
    ({"const": 2**64 + 1}, "const: 18446744073709551617 is no number that float64 holds exactly"),
    ({"enum": [[{"a": 10**400}]]}, "is no number that float64 holds exactly"),
    ({"minimum": float("nan")}, "minimum: NaN is no number"),
    ({"maximum": "3"}, 'maximum: expected a number, found "3"'),
    ({"exclusiveMinimum": True, "minimum": 3}, "exclusiveMinimum: expected a number, found true"),
    ({"minProperties": 2}, "#: minProperties: at most one more than there are required"),
    ({"prefixItems": [{}], "additionalItems": False}, "#: additionalItems: only beside a list"),
    ({"properties": []}, "#/properties: expected an object"),
    ({"anyOf": []}, "#/anyOf: expected a list that is not empty"),
    ({"items": 3}, "#/items: expected an object or a boolean, found 3"),
    ({"required": 3, "properties": {"a": {}}}, "required"),
    ({"type": "objekt"}, "Invalid type: objekt"),
    ({"minLength": -1}, "minLength"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"type": "string", "pattern": "("}, "unclosed group"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength (3) is greater than"),
    ({"const": "\x01"}, "no text matches it"),
    ({"$ref": "#"}, "no text matches it"),
    ([], "expected an object, found []"),
    (False, "expected an object, found false"),
]


@pytest.mark.parametrize(("schema", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_not_supported_is_refused_by_name(schema: Any, message: str) -> None:
    with pytest.raises(RequestError, match="^JSON schema.*" + re.escape(message)) as caught:
        compiled("json_schema", schema)
    assert "x-guidance" not in str(caught.value).replace("x-guidance: not supported", "")


def test_what_is_no_json_is_refused() -> None:
    for text in ("", "{", "{'a': 1}", "[" * 100_000):
        with pytest.raises(RequestError, match=r"^JSON schema: not JSON: "):
            compiled("json_schema", text)


def test_a_lenient_schema_leaves_out_what_is_not_supported() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "format": "int32", "not": {"const": 3}},
            "b": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        },
        "required": ["a"],
        "dependentRequired": {},
        "additionalProperties": False,
    }
    grammar = compiled("lark", f"start: {json_rule(schema, lenient=True)}", trusted=True)
    assert matches(grammar, '{"a": 3, "b": 2.5}')
    assert not matches(grammar, '{"b": 2.5}') and not matches(grammar, '{"a": "x"}')
    with pytest.raises(RequestError, match="is outside of the schema"):
        json_rule({"$ref": "http://x"}, lenient=True)
