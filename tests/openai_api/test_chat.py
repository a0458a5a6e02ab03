"""Chat completions: whole replies, streams, and the model's name."""

import json
from typing import Any

import pytest

from relaxlm.engine.types import GenerationRequest
from relaxlm.errors import LibraryError
from relaxlm.openai_api.errors import ApiError
from relaxlm.openai_api.replies import ChatCompletion
from relaxlm.openai_api.service import ApiService
from tests.openai_api.asking import LOOK, answer, ask, chunks, serve, stream
from tests.openai_api.scripted_engine import TOOL_TEMPLATE, Player, ScriptedEngine, say

# Whole replies


def test_a_reply_is_put_together() -> None:
    reply = ask(script=say("Good ", "morning"))
    choice = reply.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Good morning", "stop")
    data = json.loads(reply.as_json())
    assert data["object"] == "chat.completion"
    assert data["model"] == "scripted"
    assert data["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "Good morning", "refusal": None},
        "finish_reason": "stop",
        "logprobs": None,
    }
    assert data["system_fingerprint"].startswith("relaxlm-")


def test_usage_counts_tokens_and_speeds() -> None:
    usage = ask(script=say("a", "b", "c")).usage
    assert usage.completion_tokens == 4  # the end, too
    assert usage.prompt_tokens_details.cached_tokens == 2
    assert usage.total_tokens == usage.prompt_tokens + 4
    speeds = usage.extra
    assert speeds is not None
    assert (speeds.queue_s, speeds.ttft_s, speeds.end_to_end_latency_s) == (0.5, 0.75, 2.75)
    assert speeds.prefill_tokens_per_s == (usage.prompt_tokens - 2) / 0.25
    assert speeds.decode_tokens_per_s == 3 / 2.0


def test_several_replies_are_kept_apart() -> None:
    def script(request: GenerationRequest, player: Player) -> None:
        player.send("a", index=0, prompt=player.report())
        player.send("x", index=1)
        player.send("y", index=1, finish="length")
        player.send("b", index=0, finish="stop", stopped_by="!", finished=True)

    reply = ask(script=script, n=2, stop="!")
    assert [choice.message.content for choice in reply.choices] == ["ab", "xy"]
    assert [choice.finish_reason for choice in reply.choices] == ["stop", "length"]
    assert [choice.stop_reason for choice in reply.choices] == ["!", None]


def test_log_probabilities_have_exact_bytes_and_leave_the_end_out() -> None:
    def script(request: GenerationRequest, player: Player) -> None:
        # "Ã" in the byte-level letters is the first byte of "é".
        half = player.engine.model.tokenizer.token_to_id("Ã")
        player.send("", "b", ids=[half, 66], prompt=player.report())
        player.send("", ids=[2], finish="stop", stopped_by=2, finished=True)

    logprobs = ask(script=script, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content[0].bytes == [0xC3]
    assert logprobs.content[0].token == "\ufffd"
    assert len(logprobs.content) == 2
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2, 2]
    assert logprobs.content[0].top_logprobs[0].bytes == [0xC3]


def test_calls_and_reasoning_are_told_apart_from_the_text() -> None:
    call = '<tool_call>{"name": "look", "arguments": {"at": 1}}</tool_call>'
    text = "<think>hm so</think>Let me." + call
    script = say(*(text[i : i + 3] for i in range(0, len(text), 3)))
    reply = ask(TOOL_TEMPLATE, script, tools=[LOOK])
    message = reply.choices[0].message
    assert (message.reasoning_content, message.content) == ("hm so", "Let me.")
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.name == "look"
    assert json.loads(message.tool_calls[0].function.arguments) == {"at": 1}
    assert reply.choices[0].finish_reason == "tool_calls"
    # 20 characters, three in a token; the last of these begins the answer.
    assert reply.usage.completion_tokens_details.reasoning_tokens == 6


def test_a_call_that_is_cut_off_is_no_finished_call() -> None:
    script = say('<tool_call>{"name": "look", "arguments": {"at', stop=False)
    choice = ask(TOOL_TEMPLATE, script, tools=[LOOK]).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is not None


# Streams


def test_a_stream_has_the_role_then_text_then_the_end_then_usage() -> None:
    found = chunks(say("Good ", "morning"), stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta for chunk in found[:-1]]
    assert deltas[0].role == "assistant"
    assert deltas[0].content == ""
    assert "".join(delta.content or "" for delta in deltas) == "Good morning"
    ends = [chunk.choices[0].finish_reason for chunk in found[:-1]]
    assert ends == [None] * (len(ends) - 1) + ["stop"]
    assert found[-1].choices == []
    assert found[-1].usage is not None
    assert found[-1].usage.completion_tokens == 3
    assert all(json.loads(chunk.as_json())["usage"] is None for chunk in found[:-1])
    assert len({chunk.id for chunk in found}) == 1


def test_a_stream_without_usage_ends_with_the_finish_reason() -> None:
    assert chunks(say("a"))[-1].choices[0].finish_reason == "stop"


def test_streamed_log_probabilities_are_those_of_the_whole() -> None:
    script = say("a", "", "b")
    whole = ask(script=script, logprobs=True, top_logprobs=1).choices[0].logprobs
    parts = [
        entry
        for chunk in chunks(script, logprobs=True, top_logprobs=1)
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content
    ]
    assert whole is not None
    assert parts == whole.content


def test_streamed_calls_are_those_of_the_whole() -> None:
    text = '<think>hm</think>Yes<tool_call>{"name": "look", "arguments": {"at": "sky"}}</tool_call>'
    found = chunks(say(*text), TOOL_TEMPLATE, tools=[LOOK])
    deltas = [chunk.choices[0].delta for chunk in found]
    assert "".join(delta.reasoning_content or "" for delta in deltas) == "hm"
    assert "".join(delta.content or "" for delta in deltas) == "Yes"
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert (calls[0].type, calls[0].function.name) == ("function", "look")
    assert calls[0].id
    assert all(call.id is None and call.index == 0 for call in calls[1:])
    arguments = "".join(call.function.arguments or "" for call in calls)
    assert json.loads(arguments) == {"at": "sky"}
    assert found[-1].choices[0].finish_reason == "tool_calls"


def test_server_sent_events_end_with_done_or_an_error() -> None:
    async def events(service: ApiService, _: ScriptedEngine) -> list[str]:
        return [event async for event in (await stream(service)).events()]

    found = serve(say("a"), events)
    assert found[-1] == "data: [DONE]\n\n"
    assert all(event.startswith("data: {") and event.endswith("}\n\n") for event in found[:-1])

    def fails(request: GenerationRequest, player: Player) -> None:
        player.send("a", prompt=player.report())
        player.fail(LibraryError("NaN"))

    found = serve(fails, events)
    assert json.loads(found[-2].removeprefix("data: "))["error"]["message"] == "NaN"
    assert found[-1] == "data: [DONE]\n\n"


# Models


def test_another_model_is_refused_only_if_names_are_strict() -> None:
    assert ask(model="gpt-5").model == "scripted"

    async def strict(service: ApiService, _: ScriptedEngine) -> ChatCompletion:
        assert (await answer(service, model="mine")).model == "mine"
        assert service.model("mine").id == service.models().data[0].id
        with pytest.raises(ApiError, match="'scripted' is not here"):
            service.model("scripted")
        return await answer(service, model="gpt-5")

    with pytest.raises(ApiError) as info:
        serve(say("a"), strict, name="mine", strict_model_name=True)
    assert (info.value.status, info.value.code) == (404, "model_not_found")


def test_updates_are_shown_to_who_counts_them() -> None:
    seen: list[Any] = []

    async def ask_once(service: ApiService, _: ScriptedEngine) -> None:
        await answer(service)

    serve(say("a", "b"), ask_once, on_update=seen.append)
    assert len(seen) == 3
    assert seen[-1].finished
