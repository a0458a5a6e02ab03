import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from relaxlm.engine.types import GenerationRequest
from relaxlm.errors import BusyError, LibraryError, RequestError
from relaxlm.openai_api.chat_request import ChatCompletionRequest
from relaxlm.openai_api.errors import ApiError
from relaxlm.openai_api.replies import ChatCompletion, ChatCompletionChunk
from relaxlm.openai_api.service import ApiService
from relaxlm.openai_api.stream import ReplyStream
from tests.openai_api.scripted_engine import TOOL_TEMPLATE, Player, ScriptedEngine, say
from tests.tiny_model import TEMPLATE

USER = [{"role": "user", "content": "Hello"}]
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
CALL = {"id": "c1", "type": "function"} | {
    "function": {"name": "look", "arguments": '{"at": "sky"}'}
}
CONVERSATION = {
    "name": "plain",
    "system_template": "{system_message}",
    "roles": {"user": "user", "assistant": "assistant"},
    "seps": ["\n"],
    "role_content_sep": ": ",
    "role_empty_sep": ":",
    "system_prefix_token_ids": [0],
}
Script = Callable[[GenerationRequest, Player], None]
Answers = Callable[[ApiService, ScriptedEngine], Coroutine[Any, Any, Any]]


def serve(
    script: Script, ask: Answers, template: str | dict | None = TEMPLATE, **options: Any
) -> Any:
    async def run() -> Any:
        engine = ScriptedEngine(script, template)
        service = ApiService(engine, **options)  # type: ignore[arg-type]
        try:
            return await asyncio.wait_for(ask(service, engine), 10)
        finally:
            service.close()

    return asyncio.run(run())


async def answer(service: ApiService, **fields: Any) -> ChatCompletion:
    reply = await service.chat(ChatCompletionRequest.parse({"messages": USER, **fields}))
    assert isinstance(reply, ChatCompletion)
    return reply


async def stream(service: ApiService, **fields: Any) -> ReplyStream[ChatCompletionChunk]:
    fields = {"messages": USER, "stream": True, **fields}
    reply = await service.chat(ChatCompletionRequest.parse(fields))
    assert isinstance(reply, ReplyStream)
    return reply


def ask(
    template: str | dict | None = TEMPLATE, script: Script | None = None, **fields: Any
) -> ChatCompletion:
    return serve(script or say("Hi"), lambda service, _: answer(service, **fields), template)


def chunks(
    script: Script, template: str | dict | None = TEMPLATE, **fields: Any
) -> list[ChatCompletionChunk]:
    async def collect(service: ApiService, _: ScriptedEngine) -> list[ChatCompletionChunk]:
        return [chunk async for chunk in await stream(service, **fields)]

    return serve(script, collect, template)


def submitted(
    template: str | dict | None = TEMPLATE, **fields: Any
) -> tuple[GenerationRequest, str]:
    """What the engine was asked, and the text of its prompt."""

    async def run(service: ApiService, engine: ScriptedEngine) -> tuple[GenerationRequest, str]:
        await answer(service, **fields)
        request = engine.submitted[0]
        return request, engine.model.tokenizer.decode(request.prompt, skip_special_tokens=False)

    return serve(say("Hi"), run, template)


def refused(template: str | dict | None = TEMPLATE, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as info:
        ask(template, **fields)
    return info.value


# What the engine is asked


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


# Errors, cancellation


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("the grammar hit a limit"), 400, None),
        (LibraryError("NaN"), 500, "engine_error"),
        (BusyError("closing", closing=True), 503, "shutting_down"),
    ],
    ids=["request", "library", "closing"],
)
def test_an_error_of_the_engine_has_its_status(
    error: Exception, status: int, code: str | None
) -> None:
    def script(request: GenerationRequest, player: Player) -> None:
        player.send("a", prompt=player.report())
        player.fail(error)  # type: ignore[arg-type]

    with pytest.raises(ApiError) as info:
        ask(script=script)
    assert (info.value.status, info.value.code) == (status, code)
    with pytest.raises(ApiError, match=str(error)):
        chunks(script)


def test_a_full_queue_is_told_before_the_stream_begins() -> None:
    async def ask_full(service: ApiService, engine: ScriptedEngine) -> None:
        engine.refuse_after = (0, BusyError("256 wait", retry_after=7.0))
        with pytest.raises(ApiError) as info:
            await stream(service)
        assert (info.value.status, info.value.retry_after) == (429, 7.0)

    serve(say("a"), ask_full)


def test_an_engine_that_ends_early_is_an_error_and_no_short_reply() -> None:
    def script(request: GenerationRequest, player: Player) -> None:
        player.send("a", prompt=player.report())
        player.send(finish="cancelled", finished=True)

    with pytest.raises(ApiError) as info:
        ask(script=script)
    assert info.value.status == 503


def endless(request: GenerationRequest, player: Player) -> None:
    player.send("a", prompt=player.report())


def test_a_closed_stream_cancels_its_request() -> None:
    async def leave(service: ApiService, engine: ScriptedEngine) -> None:
        reading = await stream(service)
        await anext(reading)
        await reading.aclose()
        assert engine.cancelled == [1]
        unread = await stream(service)
        await unread.aclose()
        assert engine.cancelled == [1, 2]
        forgotten = await stream(service)
        del forgotten
        assert engine.cancelled == [1, 2, 3]

    serve(endless, leave)


def test_a_cancelled_task_cancels_its_request() -> None:
    async def leave(service: ApiService, engine: ScriptedEngine) -> None:
        task = asyncio.create_task(answer(service))
        while not engine.submitted:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.cancelled == [1]

    serve(endless, leave)


def test_a_finished_request_is_not_cancelled() -> None:
    async def finish(service: ApiService, engine: ScriptedEngine) -> list[int]:
        await answer(service)
        reading = await stream(service)
        async for _ in reading:
            pass
        await reading.aclose()
        return engine.cancelled

    assert serve(say("a"), finish) == []


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
