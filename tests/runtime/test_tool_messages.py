import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from relaxlm.runtime.template import ChatTemplate
from relaxlm.runtime.tool_messages import (
    ToolHabits,
    calls_as_text,
    checked_calls,
    complete_tools,
    fitted,
    habits,
    short_id,
    tools_in_system_message,
)


def habits_of(source: str) -> ToolHabits:
    template = ChatTemplate(source)

    def render(messages: Sequence[Mapping[str, Any]], tools: Any) -> str:
        return template.render(messages, tools=tools)

    return habits(render)


def calls(arguments: str, name: str = "c.function.name", content: str = "m.content or ''") -> str:
    return (
        f"{{% for m in messages %}}{{{{ {content} }}}}{{% for c in m.tool_calls or [] %}}"
        f"{{{{ {name} }}}}{{{{ {arguments} }}}}{{% endfor %}}{{% endfor %}}"
    )


OBJECT = "c.function.arguments | tojson"
NAMED_RESULTS = "{% for m in messages if m.role == 'tool' %}{{ m.name + m.content }}{% endfor %}"
CHECKS_IDS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "{% if c.id | length != 9 %}{{ raise_exception('9!') }}{% endif %}{% endfor %}{% endfor %}"
)


# gpt-oss, in short: what is said beside a call is reasoning, and there is but one of both.
ONE_TEXT = (
    "{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.content and m.thinking %}{{ raise_exception('both') }}{% endif %}"
    "<analysis>{{ m.content or m.thinking }}{% set c = m.tool_calls[0].function %}"
    "{{ c.name }}{{ c.arguments | tojson }}{% else %}{{ m.content or '' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (ONE_TEXT, ToolHabits(False, True, True, empty_content=None, one_call=True, one_text=True)),
        (calls(OBJECT), ToolHabits(False, True, True, empty_content=None)),
        (
            calls("'' + c.function.arguments"),
            ToolHabits(False, True, True, arguments_as_text=True, empty_content=None),
        ),
        (
            calls("c.function.arguments"),  # Python's spelling, if it were an object
            ToolHabits(False, True, True, arguments_as_text=True, empty_content=None),
        ),
        (calls(OBJECT, content="m.content"), ToolHabits(False, True, True, empty_content="")),
        (calls(OBJECT, content="'' + m.content"), ToolHabits(False, True, True, empty_content="")),
        (
            calls("c.arguments | tojson", "'' + c.name"),
            ToolHabits(False, True, True, flat_calls=True, empty_content=None),
        ),
        (
            calls(OBJECT, content="''") + CHECKS_IDS,
            ToolHabits(False, False, True, empty_content=None, short_ids=True),
        ),
        (
            "{{ tools[0].function.description }}",
            ToolHabits(True, False, False),
        ),
        (
            "{{ tools[0].function.name + tools[0].function.description }}",
            ToolHabits(True, False, False, descriptions=True),
        ),
        ("{{ messages[0].content }}", ToolHabits(False, False, False)),
        ("{{ raise_exception('no') }}", ToolHabits(False, False, False)),
    ],
)
def test_habits_are_found_by_trying(source: str, expected: ToolHabits) -> None:
    assert habits_of(source) == expected


def test_results_have_the_name_of_their_function() -> None:
    assert habits_of(
        calls(OBJECT, content="''") + NAMED_RESULTS.split("{% for m in messages %}")[0]
    )
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "x"},
        {"role": "tool", "tool_call_id": "b", "content": "x"},
        {"role": "tool", "tool_call_id": "a", "name": "g", "content": "x"},
    ]
    messages[0]["tool_calls"][0]["function"]["arguments"] = {}
    assert [m.get("name") for m in fitted(messages, ToolHabits(True, True, True))] == [
        None,
        "f",
        None,
        "g",
    ]


def test_ids_of_nine_characters() -> None:
    assert short_id("abcdefghi") == "abcdefghi"
    assert short_id("call_1") == short_id("call_1") != short_id("call_2")
    assert len(short_id("call_1")) == 9 and short_id("call_1").isalnum()
    messages: list[dict[str, Any]] = [
        {
            "role": "assistant",
            "tool_calls": [{"id": "call_1", "function": {"name": "f", "arguments": {}}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "x"},
    ]
    before = json.dumps(messages)
    short = fitted(messages, ToolHabits(True, True, True, short_ids=True))
    assert short[0]["tool_calls"][0]["id"] == short[1]["tool_call_id"] == short_id("call_1")
    assert json.dumps(messages) == before


def test_content_and_reasoning_beside_a_call_become_one_where_they_must() -> None:
    found = habits_of(ONE_TEXT)
    call = {"function": {"name": "f", "arguments": {}}}
    for name in ("reasoning_content", "thinking", "reasoning"):
        said: dict[str, Any] = {"role": "assistant", name: "hm", "content": "Wait."}
        (message,) = fitted([{**said, "tool_calls": [call]}], found)
        assert (message[name], message["content"]) == ("hm\n\nWait.", None)
        assert ChatTemplate(ONE_TEXT).render([message]) == "<analysis>hm\n\nWait.f{}"
        (message,) = fitted([{**said, name: None, "tool_calls": [call]}], found)
        assert message["content"] == "Wait."
        (message,) = fitted([said], found)
        assert message == said


def test_calls_of_a_message_are_parted_for_templates_that_write_one() -> None:
    only_one = "{% if m.tool_calls | length > 1 %}{{ raise_exception('one!') }}{% endif %}"
    refusing = habits_of(calls(OBJECT).replace("{% for c", only_one + "{% for c"))
    assert refusing.one_call and not habits_of(calls(OBJECT)).one_call
    two = [{"id": name, "function": {"name": name, "arguments": {}}} for name in "ab"]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "Wait.", "reasoning": "hm", "tool_calls": two},
        {"role": "tool", "tool_call_id": "b", "content": "of b"},
        {"role": "tool", "tool_call_id": "a", "content": "of a"},
        {"role": "tool", "tool_call_id": "c", "content": "of none"},
    ]
    parted = [
        (m["role"], m["content"], m.get("reasoning"), [c["id"] for c in m.get("tool_calls", [])])
        for m in fitted(messages, refusing)
    ]
    assert parted == [
        ("user", "u", None, []),
        ("assistant", "Wait.", "hm", ["a"]),
        ("tool", "of a", None, []),
        ("assistant", None, None, ["b"]),
        ("tool", "of b", None, []),
        ("tool", "of none", None, []),
    ]
    assert len(fitted(messages, ToolHabits(True, True, True))) == len(messages)


def test_content_beside_calls_stays() -> None:
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    message = {"role": "assistant", "content": "see", "tool_calls": [call]}
    (text,) = fitted([message], ToolHabits(True, True, True, arguments_as_text=True))
    assert text["content"] == "see"
    assert text["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


def test_what_clients_may_leave_out_of_tools() -> None:
    empty = {"type": "object", "properties": {}}
    given = [{"type": "function", "function": {"name": "f", "parameters": None}}]
    assert complete_tools(given, descriptions=False)[0]["function"] == {
        "name": "f",
        "parameters": empty,
    }
    assert complete_tools(given, descriptions=True)[0]["function"]["description"] == ""
    whole = [{"type": "function", "function": {"name": "f", "parameters": {}, "description": "d"}}]
    assert complete_tools(whole, descriptions=True) == whole


def test_calls_written_into_the_content() -> None:
    call = {"function": {"name": "f", "arguments": {"a": "é"}}}
    message = {"role": "assistant", "content": "Look", "tool_calls": [call, call]}
    one = '{"name": "f", "arguments": {"a": "é"}}'
    assert calls_as_text(message, "...<tool_call>...") == {
        "role": "assistant",
        "content": f"Look\n<tool_call>\n{one}\n</tool_call>\n<tool_call>\n{one}\n</tool_call>",
    }
    phi = calls_as_text({**message, "content": None}, "...<|tool|>...")
    assert phi is not None
    assert phi["content"] == f"<|tool_call|>[{one}, {one}]<|/tool_call|>"
    assert calls_as_text(message, "...") is None


def test_functions_as_text_in_the_system_message() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    user = {"role": "user", "content": "hi"}
    assert tools_in_system_message([user], tools) == [
        {"role": "system", "content": "", "tools": '[{"name": "f"}]'},
        user,
    ]
    system = {"role": "system", "content": "be"}
    assert tools_in_system_message([system, user], tools)[0] == {
        **system,
        "tools": '[{"name": "f"}]',
    }


def test_a_message_without_calls_stays_as_it_is() -> None:
    message = {"role": "user", "content": "x"}
    assert checked_calls(message, 0) is message
