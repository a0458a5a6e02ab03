"""Every field of OpenAI's requests is honoured, refused by name, or known to have no effect."""

from typing import Any, get_type_hints

import pytest
from openai.types import chat as openai_chat
from openai.types import completion_create_params, embedding_create_params
from openai.types import responses as openai_responses
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params, response_input_param
from openai.types.shared_params import function_definition, reasoning, response_format_json_schema

from relaxlm.openai_api import chat_request, response_request
from relaxlm.openai_api.chat_request import ChatCompletionRequest
from relaxlm.openai_api.errors import ApiError
from relaxlm.openai_api.fields import RequestModel, plain
from relaxlm.openai_api.replies import ChatMessage
from relaxlm.openai_api.requests import CompletionRequest, EmbeddingRequest, TokenizeRequest
from relaxlm.openai_api.response_request import ResponseRequest
from relaxlm.openai_api.sampling_fields import StreamOptions

USER = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "look"}}

PAIRS: list[tuple[type[RequestModel], Any]] = [
    (ChatCompletionRequest, chat_create_params.CompletionCreateParamsBase),
    (ChatCompletionRequest, chat_create_params.CompletionCreateParamsStreaming),
    (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
    (CompletionRequest, completion_create_params.CompletionCreateParamsStreaming),
    (EmbeddingRequest, embedding_create_params.EmbeddingCreateParams),
    (ResponseRequest, response_create_params.ResponseCreateParamsBase),
    (ResponseRequest, response_create_params.ResponseCreateParamsStreaming),
    (StreamOptions, openai_chat.ChatCompletionStreamOptionsParam),
    (chat_request.SystemMessage, openai_chat.ChatCompletionSystemMessageParam),
    (chat_request.SystemMessage, openai_chat.ChatCompletionDeveloperMessageParam),
    (chat_request.UserMessage, openai_chat.ChatCompletionUserMessageParam),
    (chat_request.AssistantMessage, openai_chat.ChatCompletionAssistantMessageParam),
    (chat_request.ToolMessage, openai_chat.ChatCompletionToolMessageParam),
    (chat_request.TextPart, openai_chat.ChatCompletionContentPartTextParam),
    (chat_request.ToolCall, openai_chat.ChatCompletionMessageFunctionToolCallParam),
    (chat_request.Tool, openai_chat.ChatCompletionFunctionToolParam),
    (chat_request.FunctionDefinition, function_definition.FunctionDefinition),
    (chat_request.JsonSchema, response_format_json_schema.JSONSchema),
    (chat_request.AllowedToolChoice, openai_chat.ChatCompletionAllowedToolChoiceParam),
    (chat_request.AllowedTools, openai_chat.ChatCompletionAllowedToolsParam),
    (chat_request.NamedFunction, openai_chat.ChatCompletionNamedToolChoiceParam),
    (chat_request.CacheOptions, chat_create_params.PromptCacheOptions),
    (response_request.InputMessage, openai_responses.EasyInputMessageParam),
    (response_request.InputMessage, openai_responses.ResponseOutputMessageParam),
    (response_request.InputMessage, response_input_param.Message),
    (response_request.InputText, openai_responses.ResponseInputTextParam),
    (response_request.InputText, openai_responses.ResponseOutputTextParam),
    (response_request.InputCall, openai_responses.ResponseFunctionToolCallParam),
    (response_request.InputCallOutput, response_input_param.FunctionCallOutput),
    (response_request.InputReasoning, openai_responses.ResponseReasoningItemParam),
    (response_request.FunctionTool, openai_responses.FunctionToolParam),
    (response_request.TextSettings, openai_responses.ResponseTextConfigParam),
    (response_request.SchemaFormat, openai_responses.ResponseFormatTextJSONSchemaConfigParam),
    (response_request.ChosenTools, openai_responses.ToolChoiceAllowedParam),
    (response_request.Reasoning, reasoning.Reasoning),
    (response_request.ResponseStreamOptions, response_create_params.StreamOptions),
    (response_request.ResponseCacheOptions, response_create_params.PromptCacheOptions),
]


def names(model: type[RequestModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda kind: kind.__name__)
def test_every_documented_field_is_known(ours: type[RequestModel], theirs: Any) -> None:
    documented = set(get_type_hints(theirs))
    assert documented <= names(ours) | set(ours.refused)


def every_model() -> set[type[RequestModel]]:
    found: set[type[RequestModel]] = set()
    pending = [RequestModel]
    while pending:
        kind = pending.pop()
        found.add(kind)
        pending += kind.__subclasses__()
    return found


@pytest.mark.parametrize("model", sorted(every_model(), key=str), ids=lambda kind: kind.__name__)
def test_no_field_is_in_two_groups(model: type[RequestModel]) -> None:
    assert not names(model) & set(model.refused)
    assert set(model.without_effect) <= names(model)


def refusal(kind: type[RequestModel], **fields: Any) -> tuple[str | None, str]:
    with pytest.raises(ApiError) as info:
        kind.parse(fields)
    assert info.value.status == 400
    return info.value.param, str(info.value)


def chat(**fields: Any) -> tuple[str | None, str]:
    return refusal(ChatCompletionRequest, **{"messages": USER, **fields})


def about(message: dict[str, Any]) -> tuple[str | None, str]:
    return refusal(ChatCompletionRequest, messages=[message])


@pytest.mark.parametrize(
    ("kind", "required"),
    [
        (ChatCompletionRequest, {"messages": USER}),
        (CompletionRequest, {"prompt": "Once"}),
        (ResponseRequest, {"input": "Hello"}),
    ],
    ids=["chat", "completions", "responses"],
)
def test_refused_fields_are_named_and_null_is_not_given(
    kind: type[RequestModel], required: dict[str, Any]
) -> None:
    for name in kind.refused:
        param, message = refusal(kind, **required, **{name: {"some": "value"}})
        assert param == name
        assert message.startswith(f"{name} is not supported: ")
    nothing = dict.fromkeys([*kind.refused, *(names(kind) - set(required))])
    assert kind.parse({**required, **nothing}) == kind.parse(required)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", True),
        ("service_tier", "flex"),
        ("modalities", ["text", "audio"]),
        ("prompt_cache_options", {"mode": "explicit"}),
        ("stream_options", {"include_obfuscation": True}),
    ],
)
def test_fields_without_effect_take_only_what_has_none(field: str, value: Any) -> None:
    param, _ = chat(**{field: value, "stream": True})
    assert param is not None
    assert param.startswith(field)


def test_an_unknown_field_gets_a_hint() -> None:
    assert chat(temprature=1) == (
        "temprature",
        "temprature is not a field of this request: did you mean 'temperature'?",
    )
    param, message = chat(stream=True, stream_options={"usage": True})
    assert param == "stream_options.usage"
    assert "include_usage" in message


def test_other_servers_fields_are_told_what_to_use_instead() -> None:
    assert 'use response_format = {"type": "regex"' in chat(guided_regex="a+")[1]


@pytest.mark.parametrize(
    ("message", "param", "text"),
    [
        ({"role": "user"}, "messages[0].content", "is missing: it is required"),
        ({"role": "function", "content": "a"}, "messages[0]", "'system', 'developer', 'user'"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
            "= 'image_url' is not supported: this model reads no images",
        ),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
            "messages[0].content[0].type",
            "reads no audio",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", "missing"),
        ({"role": "user", "content": []}, "messages[0].content", "at least 1 item"),
        ({"role": "assistant"}, "messages[0].content", "has content or tool_calls"),
        (
            {"role": "assistant", "content": "a", "audio": {"id": "1"}},
            "messages[0].audio",
            "reads no audio",
        ),
        ({"role": "user", "content": "\ud800"}, "messages[0].content", "surrogate pair"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:25],
)
def test_a_wrong_message_is_pointed_at(message: dict[str, Any], param: str, text: str) -> None:
    found, said = about(message)
    assert found == param
    assert text in said


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"temperature": "1"}, "temperature", "= '1' is not possible: expected a valid number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": True}, "n", "expected a valid integer"),
        ({"seed": 1.5}, "seed", "expected a valid integer"),
        ({"stop": 5}, "stop", "expected a valid string or expected a valid list"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        ({"stop": ["a"] * 65}, "stop", "at most 64 items"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", "match pattern"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
        ({"top_logprobs": 2}, "top_logprobs", "= 2 needs logprobs = true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "give one"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
        ({"response_format": {"type": "yaml"}}, "response_format", "'json_schema'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "missing",
        ),
        ({"response_format": {"type": "regex", "regex": ""}}, "response_format.regex", "at least"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].custom", "type function"),
        ({"tools": [{**TOOL, "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tools": [TOOL], "tool_choice": "must"}, "tool_choice", "'required'"),
        ({"continue_final_message": True}, "continue_final_message", "one of the assistant"),
    ],
    ids=lambda value: "",
)
def test_a_wrong_value_is_repeated_with_what_was_expected(
    fields: dict[str, Any], param: str, text: str
) -> None:
    found, said = chat(**fields)
    assert found == param
    assert text in said
    assert len(said) < 300


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [[1], ["a"]]}, "prompt[1][0]", "expected a valid integer"),
        ({"prompt": "a", "best_of": 2}, "best_of", "= 2 with n = 1 is not supported"),
        ({"prompt": "a", "logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "echo = true"),
    ],
    ids=lambda value: "",
)
def test_a_wrong_completion_is_refused(fields: dict[str, Any], param: str, text: str) -> None:
    found, said = refusal(CompletionRequest, **fields)
    assert found == param
    assert text in said


def test_tokenize_takes_a_prompt_or_messages() -> None:
    assert refusal(TokenizeRequest)[0] == "prompt"
    assert refusal(TokenizeRequest, prompt="a", messages=USER)[0] == "prompt"
    assert refusal(TokenizeRequest, prompt="a", tools=[TOOL])[0] == "tools"


def test_items_of_responses_are_pointed_at() -> None:
    param, said = refusal(ResponseRequest, input=[{"type": "web_search_call", "id": "1"}])
    assert param == "input[0]"
    assert "'function_call_output'" in said
    item = {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}
    param, said = refusal(ResponseRequest, input=[item])
    assert param == "input[0].content[0].type"
    assert "reads no images" in said


def test_half_a_character_is_refused_wherever_it_stands() -> None:
    fields: list[dict[str, Any]] = [
        {"user": "\ud800"},
        {"metadata": {"a": "\udfff"}},
        {"metadata": {"\ud800": "a"}},
        {"stop": ["\ud800"]},
        {"tools": [{**TOOL, "function": {"name": "f", "parameters": {"title": "\ud800"}}}]},
    ]
    for given in fields:
        assert "half of a surrogate pair" in chat(**given)[1]


def test_what_is_no_object_at_all_is_refused() -> None:
    with pytest.raises(ApiError, match="the request = 5 is not possible"):
        ChatCompletionRequest.parse(5)
    nested: Any = "deep"
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ApiError):
        ChatCompletionRequest.parse({"messages": USER, "chat_template_kwargs": {"a": nested}})


def test_messages_of_replies_can_be_sent_back() -> None:
    reply = ChatMessage(content="Hello", reasoning_content="hm")
    request = ChatCompletionRequest.parse(plain({"messages": (*USER, reply)}))
    assert request.messages[1].content == "Hello"
    streamed = {"id": "1", "index": 0, "type": "function"} | {
        "function": {"name": "look", "arguments": "{}"}
    }
    message = {"role": "assistant", "content": None, "tool_calls": [streamed]}
    assert ChatCompletionRequest.parse({"messages": [message], "n": None})


def test_the_json_schema_of_a_request_has_its_fields_and_no_others() -> None:
    for kind in (
        ChatCompletionRequest,
        CompletionRequest,
        ResponseRequest,
        EmbeddingRequest,
    ):
        schema = kind.model_json_schema()
        assert set(schema["properties"]) == names(kind)
        assert schema["additionalProperties"] is False
