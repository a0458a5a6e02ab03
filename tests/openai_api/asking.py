"""Chat completions of a scripted engine: what tests ask, and how."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from relaxlm.engine.types import GenerationRequest
from relaxlm.openai_api.chat_request import ChatCompletionRequest
from relaxlm.openai_api.errors import ApiError
from relaxlm.openai_api.replies import ChatCompletion, ChatCompletionChunk
from relaxlm.openai_api.service import ApiService
from relaxlm.openai_api.stream import ReplyStream
from tests.openai_api.scripted_engine import Player, ScriptedEngine, say
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
