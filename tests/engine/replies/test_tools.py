from typing import Any

import pytest

from relaxlm.engine.replies import Function, tool_request
from relaxlm.errors import RequestError
from tests.engine.replies.samples import PARAMETERS, TOOLS, function

NAMED_F = {"type": "function", "function": {"name": "f"}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_what_is_asked_for() -> None:
    asked = tool_request(TOOLS)
    assert asked is not None
    assert asked.tools == tuple(TOOLS)
    assert asked.functions == (
        Function("f", PARAMETERS),
        Function("g", {"type": "object", "properties": {}, "additionalProperties": False}),
    )
    assert (asked.required, asked.parallel, asked.constrained) == (False, True, False)
    assert asked.names == {"f", "g"}


@pytest.mark.parametrize(
    ("choice", "names", "required"),
    [
        (None, "fg", False),
        ("auto", "fg", False),
        ("required", "fg", True),
        (NAMED_F, "f", True),
        (allowed("auto", "g"), "g", False),
        (allowed("required", "g", "f", "g"), "fg", True),
    ],
)
def test_tool_choice(choice: object, names: str, required: bool) -> None:
    asked = tool_request(TOOLS, choice)
    assert asked is not None
    assert asked.names == set(names) and asked.required == required
    assert asked.constrained == (required or len(names) < 2)
    assert asked.tools == tuple(TOOLS)


def test_no_tools() -> None:
    assert tool_request(None) is None
    assert tool_request([]) is None
    assert tool_request([], "none") is None
    assert tool_request(TOOLS, "none") is None


def test_what_makes_a_grammar_necessary() -> None:
    one_call = tool_request(TOOLS, parallel_tool_calls=False)
    assert one_call is not None and one_call.constrained and not one_call.parallel
    strict = tool_request([function("f", strict=True, parameters={"type": "object"})])
    assert strict is not None and strict.constrained and strict.functions[0].strict
    free = tool_request([function("f", strict=False, parameters={})], "auto", True)
    assert free is not None and not free.constrained


def test_parameters_without_a_type_are_an_object() -> None:
    asked = tool_request([function("f", parameters={"properties": {"a": True}})])
    assert asked is not None
    assert asked.functions[0].parameters == {"type": "object", "properties": {"a": True}}


@pytest.mark.parametrize(
    ("tools", "choice", "parallel", "expected"),
    [
        (None, "auto", None, "tool_choice is only possible with tools: add tools, or leave it out"),
        (
            [],
            None,
            True,
            "parallel_tool_calls is only possible with tools: add tools, or leave it out",
        ),
        ("f", None, None, "tools is of type str: expected a list"),
        ([function("f")] * 129, None, None, "tools has 129 entries: at most 128 are taken"),
        (["f"], None, None, "tools[0] is of type str: expected an object"),
        (
            [{"type": "custom"}],
            None,
            None,
            "tools[0].type = 'custom' is not supported: expected 'function'",
        ),
        (
            [function("f"), {"type": "function"}],
            None,
            None,
            "tools[1].function is missing: expected an object with a name",
        ),
        (
            [function("get weather")],
            None,
            None,
            "tools[0].function.name = 'get weather': expected 1 to 64 letters, digits, _ and -",
        ),
        (
            [function("a" * 65)],
            None,
            None,
            f"tools[0].function.name = '{'a' * 65}': expected 1 to 64 letters, digits, _ and -",
        ),
        (
            [function("f\n")],
            None,
            None,
            "tools[0].function.name = 'f\\n': expected 1 to 64 letters, digits, _ and -",
        ),
        (
            [function("f"), function("f")],
            None,
            None,
            "tools[1].function.name: a second function 'f'",
        ),
        (
            [function("f", description=1)],
            None,
            None,
            "tools[0].function.description: expected text",
        ),
        (
            [function("f", strict="yes")],
            None,
            None,
            "tools[0].function.strict = 'yes': expected true or false",
        ),
        (
            [function("f", parameters={"type": "array"})],
            None,
            None,
            'tools[0].function.parameters: expected a JSON schema of the type "object"',
        ),
        (
            [function("f", parameters={"properties": {"a": "string"}})],
            None,
            None,
            "tools[0].function.parameters.properties: expected an object of JSON schemas",
        ),
        (
            TOOLS,
            {"type": "function", "function": {"name": "h"}},
            None,
            "tool_choice.function.name = 'h': no such tool; there are f, g",
        ),
        (
            TOOLS,
            {"type": "function"},
            None,
            "tool_choice.function.name is missing: expected the name of a tool",
        ),
        (
            TOOLS,
            {"type": "allowed_tools"},
            None,
            "tool_choice.allowed_tools: expected an object with mode and tools",
        ),
        (
            TOOLS,
            allowed("any", "f"),
            None,
            "tool_choice.allowed_tools.mode = 'any': expected 'auto' or 'required'",
        ),
        (
            TOOLS,
            allowed("auto"),
            None,
            "tool_choice.allowed_tools.tools: expected a list of functions",
        ),
        (
            TOOLS,
            allowed("auto", "f", "h"),
            None,
            "tool_choice.allowed_tools.tools[1].function.name = 'h': no such tool; there are f, g",
        ),
    ],
)
def test_what_is_refused(tools: Any, choice: Any, parallel: bool | None, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        tool_request(tools, choice, parallel)
    assert str(caught.value) == expected


def test_another_tool_choice() -> None:
    with pytest.raises(RequestError, match=r"tool_choice = 'any': expected 'none', 'auto'"):
        tool_request(TOOLS, "any")
