"""What the engine is asked for a chat completion."""

from typing import Any

import pytest

from tests.openai_api.asking import CALL, CONVERSATION, LOOK, USER, refused, submitted
from tests.openai_api.scripted_engine import TOOL_TEMPLATE
from tests.tiny_model import TEMPLATE


def test_the_request_carries_settings_over_the_folders_defaults() -> None:
    request, prompt = submitted(
        top_k=5, seed=3, stop="x", stop_token_ids=[7], logit_bias={"9": 1}, max_tokens=4, n=2
    )
    config = request.config
    assert (config.top_k, config.seed, config.stop, config.max_tokens) == (5, 3, ("x",), 4)
    assert (config.stop_token_ids, config.logit_bias, config.n) == ((7,), {9: 1.0}, 2)
    assert config.temperature == 0.75  # the folder's
    assert request.stop_token_ids == {2}
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert submitted(max_completion_tokens=6)[0].config.max_tokens == 6
    assert submitted()[0].config.max_tokens is None


def test_the_last_message_of_the_assistant_is_continued() -> None:
    messages = [*USER, {"role": "assistant", "content": "I am "}]
    request, prompt = submitted(messages=messages, continue_final_message=True)
    assert prompt.endswith("<|im_start|>assistant\nI am ")
    assert request.continuing
    request, prompt = submitted(add_generation_prompt=False)
    assert prompt.endswith("<|im_end|>\n")
    assert not request.continuing


def test_developers_are_the_system_where_a_template_does_not_know_them() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, *USER]
    assert submitted(messages=messages)[1].startswith("<|im_start|>system\nBe brief.")
    knows = TEMPLATE.replace("'user',", "'user', 'developer',")
    assert submitted(knows, messages=messages)[1].startswith("<|im_start|>developer\n")


def test_conversation_templates_have_their_leading_tokens_and_no_variables() -> None:
    messages = [*USER, {"role": "assistant", "content": "I am"}]
    _, prompt = submitted(CONVERSATION, messages=messages, continue_final_message=True)
    assert prompt == "<|endoftext|>user: Hello\nassistant: I am"
    assert submitted(CONVERSATION)[1] == "<|endoftext|>user: Hello\nassistant:"
    error = refused(CONVERSATION, chat_template_kwargs={"x": 1})
    assert error.param == "chat_template_kwargs.x"


def test_a_model_without_a_template_takes_one_text() -> None:
    _, prompt = submitted(None)
    assert prompt == "Hello"
    error = refused(None, messages=[*USER, *USER])
    assert error.param == "messages"
    assert "no chat template" in str(error)


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "one\ntwo" in submitted(messages=[{"role": "user", "content": parts}])[1]


def test_tools_and_answers_reach_the_template() -> None:
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "blue"},
    ]
    _, prompt = submitted(TOOL_TEMPLATE, messages=messages, tools=[LOOK])
    assert prompt.startswith('<tools>[{"type": "function"')
    assert '<think>hm</think><tool_call>{"name": "look", "arguments": {"at": "sky"}}' in prompt
    assert "<|im_start|>tool look\nblue" in prompt
    _, prompt = submitted(TOOL_TEMPLATE, tools=[LOOK], tool_choice="none")
    assert "<tools>" not in prompt


def test_response_formats_become_grammars() -> None:
    for given in (
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}},
        {"type": "regex", "regex": "a+"},
        {"type": "grammar", "grammar": 'start: "a"'},
    ):
        assert submitted(response_format=given)[0].grammar is not None
    assert submitted(response_format={"type": "text"})[0].grammar is None


def test_reasoning_effort_and_variables_reach_templates_that_read_them() -> None:
    template = TEMPLATE + "{{ reasoning_effort }}{{ verbosity }}{{ color }}"
    fields = {"reasoning_effort": "low", "verbosity": "high"}
    _, prompt = submitted(template, **fields, chat_template_kwargs={"color": "red"})
    assert prompt.endswith("lowhighred")
    _, prompt = submitted(TOOL_TEMPLATE, chat_template_kwargs={"enable_thinking": True})
    assert prompt.endswith("<think>\n")
    template = TEMPLATE + "{{ 'thinks' if enable_thinking != false }}"
    assert not submitted(template, reasoning_effort="none")[1].endswith("thinks")
    assert submitted(verbosity="medium")


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"chat_template_kwargs": {"color": "red"}}, "chat_template_kwargs.color", "variable"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "variable"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "no such variable"),
        ({"verbosity": "high"}, "verbosity", "no such variable"),
        ({"tools": [LOOK]}, "tools", "has no place for tools"),
        ({"tool_choice": "required"}, "tool_choice", "only possible with tools"),
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format", "unclosed"),
        (
            {"messages": [{**USER[0], "name": "Mia"}]},
            "messages[0].name",
            "no place for names of the role 'user'",
        ),
        (
            {"messages": [{"role": "tool", "tool_call_id": "x", "content": "a"}]},
            "messages[0].tool_call_id",
            "answers no call",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [CALL]},
                    {"role": "tool", "tool_call_id": "c1", "name": "find", "content": "a"},
                ]
            },
            "messages[1].name",
            "is of the function 'look'",
        ),
        ({"logit_bias": {"9999999999": 1}}, "logit_bias", "is not possible"),
    ],
    ids=lambda value: "",
)
def test_what_the_model_has_no_use_for_is_refused(
    fields: dict[str, Any], param: str, text: str
) -> None:
    error = refused(**fields)
    assert (error.status, error.param) == (400, param)
    assert text in str(error)


def test_a_template_that_refuses_or_fails_is_an_error_of_the_request() -> None:
    error = refused("{{ raise_exception('no ' + messages[0].role) }}")
    assert (error.status, error.code, error.param) == (400, "template_error", "messages")
    assert "no user" in str(error)
    assert "ZeroDivisionError" in str(refused("{{ 1 // 0 }}"))


def test_formats_and_optional_tools_exclude_each_other() -> None:
    format = {"type": "json_object"}
    error = refused(TOOL_TEMPLATE, tools=[LOOK], response_format=format)
    assert error.param == "response_format"
    request, _ = submitted(
        TOOL_TEMPLATE, tools=[LOOK], response_format=format, tool_choice="required"
    )
    assert request.grammar is not None
