# ruff: noqa: RUF001 (the bar is DeepSeek's)
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relaxlm.engine.replies import Delta, ReplyMessage, ToolCall, ToolCallDelta
from relaxlm.engine.replies.formats import FORMATS, ToolFormat
from relaxlm.engine.replies.sink import openai_id, short_id
from tests.engine.replies.cases import HARD, Case, cases
from tests.engine.replies.samples import parsed, parser

CASES = list(cases())


def test_every_format_has_samples() -> None:
    assert {case.format for case in CASES} == {entry.name for entry in FORMATS}
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_in_a_reply(case: Case) -> None:
    message = parsed(parser(case.format), [case.text])
    assert [(call.name, call.arguments) for call in message.tool_calls] == case.calls
    assert message.content == case.content
    assert message.reasoning_content == case.reasoning
    assert parsed(parser(case.format), list(case.text)) == message


# Pieces of which something like a reply can be made.
FRAGMENTS = sorted(
    {
        *(mark for entry in FORMATS for mark in (*entry.marks, *entry.tokens)),
        *("<think>", "</think>", "</tool_call>", "<function=f>", "</function>", "<parameter=s>"),
        *("<parameter=n>", "</parameter>", "<arg_key>s</arg_key>", "<arg_value>", "</arg_value>"),
        *(
            "f",
            "g",
            " ",
            "\n",
            "\n\n",
            "text",
            "ł😀",
            ",",
            ";",
            ":",
            "}",
            "]",
            "{}",
            '"',
            "\\",
            "3",
        ),
        *(
            "[f(",
            "g()",
            "s='",
            "n=",
            "')",
            '<invoke name="f">',
            '<parameter name="s">',
            "</invoke>",
        ),
        *("```", "```json\n", "function", "to=functions.f", "final", "analysis", "assistant"),
        *('{"name": "f", "arguments": ', '{"name": "g", "parameters": {', '"name"', '"arguments"'),
        HARD,
    }
)


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A text, and the same in pieces."""
    if draw(st.booleans()):
        text = "".join(draw(st.lists(st.sampled_from(FRAGMENTS), max_size=12)))
    else:
        text = draw(st.sampled_from(CASES)).text
        text = text[: draw(st.integers(0, len(text)))]
        text += draw(st.sampled_from(FRAGMENTS))
    cuts = draw(st.lists(st.integers(0, len(text)), max_size=8))
    return text, [text[a:b] for a, b in pairwise(sorted({0, *cuts, len(text)}))]


@settings(max_examples=300, deadline=None)
@given(cut_texts(), st.sampled_from(FORMATS), st.booleans(), st.booleans())
def test_the_way_of_cutting_changes_nothing(
    cut: tuple[str, list[str]], entry: ToolFormat, inside: bool, tools: bool
) -> None:
    text, pieces = cut
    whole = parsed(parser(entry.name, inside=inside, tools=tools), [text])
    assert parsed(parser(entry.name, inside=inside, tools=tools), pieces) == whole
    assert parsed(parser(entry.name, inside=inside, tools=tools), list(text)) == whole


@settings(deadline=None)
@given(cut_texts(), st.sampled_from([entry for entry in FORMATS if entry.name != "harmony"]))
def test_without_tools_all_text_is_content(cut: tuple[str, list[str]], entry: ToolFormat) -> None:
    message = parsed(parser(entry.name, reasoning="none", tools=False), cut[1])
    assert message == ReplyMessage(content=cut[0])


# A reply that a limit ends behind a backslash.
CUT_OFF = '[{"name": "f", "arguments": "\\'


@settings(deadline=None)
@given(cut_texts(), st.sampled_from([entry for entry in FORMATS if entry.name != "harmony"]))
@example((CUT_OFF, [CUT_OFF]), next(entry for entry in FORMATS if entry.name == "json"))
def test_what_is_no_call_is_content(cut: tuple[str, list[str]], entry: ToolFormat) -> None:
    message = parsed(parser(entry.name, reasoning="none"), cut[1])
    if not message.tool_calls:
        assert message.content == cut[0]


def test_arguments_are_passed_on_while_they_arrive() -> None:
    new = parser("hermes")
    assert new.push('Hi <tool_call>{"name": "f", ') == [Delta(content="Hi")]
    assert new.push('"arguments": {"s": "a') == [
        Delta(tool_call=ToolCallDelta(0, '{"s": "a', "id0", "f"))
    ]
    assert new.push("b") == [Delta(tool_call=ToolCallDelta(0, "b"))]
    assert new.push('"}') == [Delta(tool_call=ToolCallDelta(0, '"}'))]
    assert new.push("}</tool_call>") == []
    assert new.finish() == []
    call = ToolCall("id0", "f", '{"s": "ab"}')
    assert new.message() == ReplyMessage(content="Hi", tool_calls=(call,))


def test_strings_in_tags_are_passed_on_while_they_arrive() -> None:
    new = parser("qwen3_coder")
    begun = new.push("<tool_call><function=f><parameter=s>\n")
    assert begun == [Delta(tool_call=ToolCallDelta(0, '{"s": "', "id0", "f"))]
    assert new.push('a "b') == [Delta(tool_call=ToolCallDelta(0, 'a \\"b'))]
    assert new.push("\n") == []
    assert new.push("</par") == []
    assert new.push("</par") == [Delta(tool_call=ToolCallDelta(0, "\\n</par"))]


def test_text_is_held_back_only_where_it_may_be_a_mark() -> None:
    new = parser("hermes")
    assert new.push("a") == [Delta(content="a")]
    assert new.push(" <tool") == []
    assert new.push("x") == [Delta(content=" <toolx")]
    assert new.push("<") == []
    assert new.finish() == [Delta(content="<")]


def test_reasoning_that_the_prompt_has_opened() -> None:
    message = parsed(parser("hermes", inside=True), ["I th", "ink.\n</think", ">\n\nYes."])
    assert message == ReplyMessage(content="Yes.", reasoning_content="I think.")
    again = parsed(parser("hermes", inside=True), ["<think>\nI think.</think>Yes."])
    assert again == ReplyMessage(content="Yes.", reasoning_content="I think.")
    unfinished = parsed(parser("hermes", inside=True), ["I think"])
    assert unfinished == ReplyMessage(content="", reasoning_content="I think")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("think", "<think>hm</think>ok"),
        ("THINK", "[THINK]hm[/THINK]ok"),
        ("seed", "<seed:think>hm</seed:think>ok"),
        ("THINKING", "<|START_THINKING|>hm<|END_THINKING|>ok"),
        ("channel", "<|channel>thought\nhm<channel|>ok"),
        ("none", "ok"),
    ],
)
def test_tags_of_reasoning(name: str, text: str) -> None:
    message = parsed(parser("hermes", reasoning=name), [text])
    assert message == ReplyMessage("ok", None if name == "none" else "hm")


def test_calls_in_the_reasoning_are_none() -> None:
    text = '<think><tool_call>{"name": "f", "arguments": {}}</tool_call></think>ok'
    assert parsed(parser("hermes"), [text]).tool_calls == ()


def test_without_tools_harmony_has_no_calls() -> None:
    text = "<|channel|>commentary to=functions.f<|message|>{}<|call|>"
    assert parsed(parser("harmony", tools=False), [text]) == ReplyMessage(content="{}")


def test_ids() -> None:
    assert openai_id().startswith("call_") and len(openai_id()) == 29
    assert len(short_id()) == 9 and short_id().isalnum()
    assert openai_id() != openai_id() and short_id() != short_id()


def test_ids_of_the_model_itself() -> None:
    text = "[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}[TOOL_CALLS]f[CALL_ID]short[ARGS]{}"
    message = parsed(parser("mistral_call_id"), [text])
    assert [call.id for call in message.tool_calls] == ["abcdefghi", "id0"]


@pytest.mark.parametrize(
    ("name", "piece"),
    [
        ("json", '{"type": {"id": '),
        ("json", '{"function": '),
        ("json", "[" * 16),
        ("hermes", '<tool_call>{"x": ['),
        ("hermes", '<tool_call>{"arguments": {"a": '),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}, {"x": ['),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}, "x": ['),
        ("deepseek", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"),
        ("qwen3_coder", "<function=f><parameter=n>["),
    ],
)
def test_the_time_does_not_grow_by_the_square(name: str, piece: str) -> None:
    text = piece * 3000
    new = parser(name, "none")
    message = parsed(new, [text, "x"])
    assert len(message.content or "") + sum(len(c.arguments) for c in message.tool_calls) > 3000
    assert new._reader._vain < 1_000_000 + 2 * len(text)


def test_a_long_reply_of_failed_calls_ends_in_content() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text = '<tool_call>{"x": [' * 3000
    assert parsed(parser("hermes"), [text[:1700], call]).tool_calls
    assert parsed(parser("hermes"), [text, call]) == ReplyMessage(content=text + call)


def test_values_that_are_nested_deeply() -> None:
    deep = "[" * 5000 + "]" * 5000
    text = '<tool_call>{"name": "f", "arguments": %s}' % deep  # noqa: UP031
    assert parsed(parser("hermes"), [text]) == ReplyMessage(content=text)
    text = f"<function=f><parameter=n>{deep}</parameter></function>"
    (call,) = parsed(parser("qwen3_coder"), [text]).tool_calls
    assert call.arguments == f'{{"n": "{deep}"}}'
