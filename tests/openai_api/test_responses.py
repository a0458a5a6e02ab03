import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import openai.types.responses as openai_responses
import pytest
from pydantic import TypeAdapter

from relaxlm.engine.types import GenerationRequest
from relaxlm.errors import LibraryError
from relaxlm.openai_api.errors import ApiError
from relaxlm.openai_api.response_chat import as_chat
from relaxlm.openai_api.response_replies import OutputCall, OutputReasoning, Response, ResponseEvent
from relaxlm.openai_api.response_request import ResponseRequest
from relaxlm.openai_api.service import ApiService
from relaxlm.openai_api.stream import ReplyStream
from tests.openai_api.scripted_engine import TOOL_TEMPLATE, Player, ScriptedEngine, say

LOOK = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
Script = Callable[[GenerationRequest, Player], None]
WITH_A_CALL = say(
    *'<think>hm</think>Let me.<tool_call>{"name": "look", "arguments": {"at": "sky"}}</tool_call>'
)


def serve(script: Script, ask: Callable[[ApiService], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        service = ApiService(ScriptedEngine(script, TOOL_TEMPLATE))  # type: ignore[arg-type]
        try:
            return await asyncio.wait_for(ask(service), 10)
        finally:
            service.close()

    return asyncio.run(run())


def respond(script: Script, **fields: Any) -> Response:
    return serve(
        script, lambda service: service.respond(ResponseRequest.parse({"input": "Hi", **fields}))
    )


def events(script: Script, **fields: Any) -> list[ResponseEvent]:
    async def ask(service: ApiService) -> list[ResponseEvent]:
        request = ResponseRequest.parse({"input": "Hi", "stream": True, **fields})
        reply = await service.respond(request)
        assert isinstance(reply, ReplyStream)
        return [event async for event in reply]

    return serve(script, ask)


def chat(**fields: Any) -> dict[str, Any]:
    request = as_chat(ResponseRequest.parse(fields))
    return request.model_dump(exclude_none=True, by_alias=True)


# Requests


def test_a_text_with_instructions_is_two_messages() -> None:
    assert chat(input="Hi", instructions="Be brief.", max_output_tokens=5) == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
        ],
        "max_completion_tokens": 5,
    }


def test_items_of_the_assistant_become_one_message() -> None:
    messages = chat(
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Look!"}]},
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "hm"}],
            },
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "Let me.", "annotations": []}],
            },
            {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "blue"},
            {"type": "function_call_output", "call_id": "c2", "output": "grey"},
            {"role": "assistant", "content": "Blue."},
            {"role": "assistant", "content": "Or grey."},
        ]
    )["messages"]
    assert [message["role"] for message in messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
        "assistant",
    ]
    assert messages[1]["reasoning_content"] == "hm"
    assert messages[1]["content"] == "Let me."
    assert [call["id"] for call in messages[1]["tool_calls"]] == ["c1", "c2"]
    assert messages[3]["tool_call_id"] == "c2"


def test_reasoning_without_a_reply_is_refused() -> None:
    with pytest.raises(ApiError, match="reasoning without a reply"):
        chat(input=[{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "a"}]}])


def test_settings_are_those_of_a_chat() -> None:
    schema = {"type": "json_schema", "name": "a", "schema": {"type": "integer"}, "strict": True}
    found = chat(
        input="Hi",
        text={"format": schema, "verbosity": "low"},
        reasoning={"effort": "low"},
        tools=[LOOK],
        tool_choice={
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "look"}],
        },
        parallel_tool_calls=False,
        top_logprobs=2,
    )
    assert found["response_format"]["json_schema"]["schema"] == {"type": "integer"}
    assert (found["verbosity"], found["reasoning_effort"]) == ("low", "low")
    assert found["tools"][0]["function"]["name"] == "look"
    assert found["tool_choice"]["allowed_tools"]["mode"] == "required"
    assert found["parallel_tool_calls"] is False
    assert (found["logprobs"], found["top_logprobs"]) == (True, 2)
    assert chat(input="Hi", include=["message.output_text.logprobs"])["logprobs"] is True
    named = chat(input="Hi", tools=[LOOK], tool_choice={"type": "function", "name": "look"})
    assert named["tool_choice"]["function"]["name"] == "look"
    # What many clients always send changes nothing without tools.
    plain = chat(input="Hi", tool_choice="auto", parallel_tool_calls=True, tools=[])
    assert plain.keys() == {"messages"}


# Replies


def test_a_response_has_items_in_order() -> None:
    response = respond(WITH_A_CALL, tools=[LOOK], metadata={"a": "b"})
    reasoning, message, call = response.output
    assert isinstance(reasoning, OutputReasoning)
    assert reasoning.content[0].text == "hm"
    assert response.output_text == "Let me."
    assert message.status == "completed"
    assert isinstance(call, OutputCall)
    assert (call.name, json.loads(call.arguments)) == ("look", {"at": "sky"})
    assert response.status == "completed"
    assert response.metadata == {"a": "b"}
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    assert response.usage.input_tokens_details.cached_tokens == 2


def test_openais_client_reads_the_response() -> None:
    for response in (
        respond(WITH_A_CALL, tools=[LOOK], tool_choice="auto"),
        respond(say("a", stop=False), top_logprobs=1, max_output_tokens=1, text={}),
    ):
        read = openai_responses.Response.model_validate_json(response.as_json())
        assert read.output_text == response.output_text
        assert read.model == "scripted"
        assert [item.type for item in read.output] == [item.type for item in response.output]


def test_a_limit_makes_a_response_incomplete() -> None:
    response = respond(say("a", stop=False), max_output_tokens=1)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    assert response.completed_at is None


def test_a_reply_without_text_is_an_empty_message() -> None:
    response = respond(say())
    assert response.output_text == ""
    assert len(response.output) == 1


def test_events_tell_the_response() -> None:
    found = events(WITH_A_CALL, tools=[LOOK])
    assert [event.sequence_number for event in found] == list(range(len(found)))
    kinds = [event.type.removeprefix("response.") for event in found]
    assert list(dict.fromkeys(kinds)) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_text.delta",
        "output_text.done",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "completed",
    ]
    response = found[-1].response
    assert response is not None
    assert response.output == [
        event.item for event in found if event.type == "response.output_item.done"
    ]
    text = "".join(e.delta or "" for e in found if e.type == "response.output_text.delta")
    assert text == response.output_text == "Let me."
    arguments = [e.delta or "" for e in found if e.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(arguments)) == {"at": "sky"}
    added = next(event for event in found if event.type == "response.output_item.added")
    assert isinstance(added.item, OutputReasoning)
    assert added.item.content == []
    assert [e.output_index for e in found if e.type == "response.output_item.done"] == [0, 1, 2]


def test_openais_client_reads_the_events() -> None:
    event: TypeAdapter = TypeAdapter(openai_responses.ResponseStreamEvent)
    for found in events(WITH_A_CALL, tools=[LOOK]) + events(say("a"), top_logprobs=1):
        assert event.validate_json(found.as_json()).type == found.type


def test_log_probabilities_belong_to_the_text() -> None:
    script = say("a", "", "b")
    response = respond(script, top_logprobs=1)
    part = response.output[0].content[0]  # type: ignore[union-attr]
    assert len(part.logprobs) == 3  # type: ignore[union-attr]
    deltas = [event for event in events(script, top_logprobs=1) if event.delta is not None]
    streamed = [entry for delta in deltas for entry in delta.logprobs or ()]
    assert streamed == part.logprobs  # type: ignore[union-attr]


def test_a_failure_in_the_middle_is_the_last_event() -> None:
    def script(request: GenerationRequest, player: Player) -> None:
        player.send("a", prompt=player.report())
        player.fail(LibraryError("NaN"))

    async def ask(service: ApiService) -> list[str]:
        reply = await service.respond(ResponseRequest.parse({"input": "Hi", "stream": True}))
        assert isinstance(reply, ReplyStream)
        return [event async for event in reply.events()]

    found = serve(script, ask)
    name, data = found[-1].rstrip("\n").split("\n")
    assert name == "event: error"
    error = json.loads(data.removeprefix("data: "))
    assert (error["type"], error["message"]) == ("error", "NaN")
    assert error["sequence_number"] == len(found) - 1
    assert found[0].startswith("event: response.created\ndata: {")
