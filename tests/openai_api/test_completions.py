import asyncio
import base64
import json
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from relaxlm.engine.types import GenerationRequest
from relaxlm.errors import BusyError, LibraryError
from relaxlm.openai_api.errors import ApiError
from relaxlm.openai_api.replies import Completion, CreateEmbeddingResponse
from relaxlm.openai_api.requests import (
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from relaxlm.openai_api.service import ApiService
from relaxlm.openai_api.stream import ReplyStream
from tests.openai_api.scripted_engine import Player, ScriptedEngine, say

Script = Callable[[GenerationRequest, Player], None]


def serve(
    script: Script, ask: Callable[[ApiService, ScriptedEngine], Coroutine[Any, Any, Any]]
) -> Any:
    async def run() -> Any:
        engine = ScriptedEngine(script)
        service = ApiService(engine)  # type: ignore[arg-type]
        try:
            return await asyncio.wait_for(ask(service, engine), 10)
        finally:
            service.close()

    return asyncio.run(run())


def complete(script: Script, **fields: Any) -> Completion:
    async def ask(service: ApiService, _: ScriptedEngine) -> Any:
        return await service.complete(CompletionRequest.parse(fields))

    return serve(script, ask)


def chunks(script: Script, **fields: Any) -> list[Completion]:
    async def ask(service: ApiService, _: ScriptedEngine) -> list[Completion]:
        reply = await service.complete(CompletionRequest.parse({"stream": True, **fields}))
        assert isinstance(reply, ReplyStream)
        return [chunk async for chunk in reply]

    return serve(script, ask)


def submitted(**fields: Any) -> list[GenerationRequest]:
    async def ask(service: ApiService, engine: ScriptedEngine) -> list[GenerationRequest]:
        await service.complete(CompletionRequest.parse(fields))
        return engine.submitted

    return serve(say("a"), ask)


def test_prompts_of_all_kinds_reach_the_engine() -> None:
    (one,) = submitted(prompt="the cat")
    assert submitted(prompt=["the cat", "the cat"])[1].prompt == one.prompt
    assert submitted(prompt=[5, 6])[0].prompt == [5, 6]
    assert [request.prompt for request in submitted(prompt=[[5], [6, 7]])] == [[5], [6, 7]]
    assert one.continuing
    assert one.config.max_tokens == 16
    assert one.stop_token_ids == {2}


def test_a_completion_has_text_and_finish_reason() -> None:
    reply = complete(say(" sat", " on"), prompt="the cat")
    data = json.loads(reply.as_json())
    assert data["object"] == "text_completion"
    assert data["choices"] == [
        {"index": 0, "text": " sat on", "finish_reason": "stop", "logprobs": None}
    ]
    assert data["usage"]["completion_tokens"] == 3


def test_prompts_and_replies_are_numbered_through() -> None:
    def script(request: GenerationRequest, player: Player) -> None:
        name = chr(96 + request.prompt[0])
        player.send(name + "0", index=0, prompt=player.report(1))
        player.send(name + "1", index=1, finish="length")
        player.send(index=0, finish="length", finished=True)

    reply = complete(script, prompt=[[1], [2]], n=2)
    assert [choice.text for choice in reply.choices] == ["a0", "a1", "b0", "b1"]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 2
    assert reply.usage.prompt_tokens_details.cached_tokens == 2
    assert {
        choice.index for chunk in chunks(script, prompt=[[1], [2]], n=2) for choice in chunk.choices
    } == {0, 1, 2, 3}


def test_log_probabilities_are_lists_side_by_side() -> None:
    logprobs = complete(say("a", "bc"), prompt="the", logprobs=2).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [-0.5, -0.5]  # none of the end
    assert logprobs.text_offset == [0, 1]
    assert logprobs.top_logprobs is not None
    assert [len(best or ()) for best in logprobs.top_logprobs] == [2, 2]
    none = complete(say("a"), prompt="the", logprobs=0).choices[0].logprobs
    assert none is not None
    assert none.top_logprobs is None


def test_an_echo_has_the_prompt_and_its_probabilities() -> None:
    reply = complete(say(" sat"), prompt="the cat", echo=True, logprobs=1)
    choice = reply.choices[0]
    assert choice.text == "the cat sat"
    logprobs = choice.logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens[:-1]) == "the cat"
    prompt_tokens = len(logprobs.tokens) - 1
    assert logprobs.token_logprobs == [None] + [-1.0] * (prompt_tokens - 1) + [-0.5]
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset[-1] == len("the cat")
    assert complete(say("!"), prompt="the", echo=True).choices[0].text == "the!"
    tokens = complete(say("!"), prompt=[1, 70], echo=True).choices[0].text
    assert tokens.startswith("<|im_start|>")


def test_an_echo_alone_computes_a_token_and_hides_it() -> None:
    (request,) = submitted(prompt="the cat", echo=True, logprobs=1, max_tokens=0)
    assert request.config.max_tokens == 1
    reply = complete(say(" sat", stop=False), prompt="the cat", echo=True, logprobs=1, max_tokens=0)
    choice = reply.choices[0]
    assert (choice.text, choice.finish_reason) == ("the cat", "length")
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens) == "the cat"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 0


def test_bytes_of_characters_are_spelled_out() -> None:
    def script(request: GenerationRequest, player: Player) -> None:
        vocabulary = player.engine.model.tokenizer
        halves = [vocabulary.token_to_id("Ã"), vocabulary.token_to_id("©")]
        player.send("", "é", "!", ids=[*halves, 5], prompt=player.report())
        player.send(finish="length", finished=True)

    logprobs = complete(script, prompt="the", logprobs=1).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens[:2] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs.text_offset == [0, 0, 1]


def test_a_stream_is_the_whole_in_pieces() -> None:
    fields = {"prompt": "the cat", "echo": True, "logprobs": 1}
    whole = complete(say(" sat", " on"), **fields).choices[0]
    found = chunks(say(" sat", " on"), **fields, stream_options={"include_usage": True})
    assert found[-1].choices == []
    assert found[-1].usage is not None
    pieces = [chunk.choices[0] for chunk in found[:-1]]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert pieces[-1].finish_reason == "stop"
    assert whole.logprobs is not None
    offsets = [o for piece in pieces if piece.logprobs for o in piece.logprobs.text_offset]
    assert offsets == whole.logprobs.text_offset


def test_one_failure_is_the_failure_of_all() -> None:
    async def ask(service: ApiService, engine: ScriptedEngine) -> None:
        with pytest.raises(ApiError, match="NaN"):
            await service.complete(CompletionRequest.parse({"prompt": [[1], [2], [3]]}))
        assert engine.cancelled == [1, 3]

    def script(request: GenerationRequest, player: Player) -> None:
        if request.prompt == [2]:
            player.fail(LibraryError("NaN"))

    serve(script, ask)


def test_prompts_beyond_the_queue_are_refused_with_all_others() -> None:
    async def ask(service: ApiService, engine: ScriptedEngine) -> None:
        engine.refuse_after = (2, BusyError("full"))
        with pytest.raises(ApiError) as info:
            await service.complete(CompletionRequest.parse({"prompt": [[1], [2], [3]]}))
        assert info.value.status == 429
        assert engine.cancelled == [1, 2]

    serve(lambda request, player: None, ask)


# Embeddings, tokens


def embed(vectors: Any, **fields: Any) -> CreateEmbeddingResponse:
    async def ask(service: ApiService, engine: ScriptedEngine) -> CreateEmbeddingResponse:
        engine.vectors = vectors
        return await service.embed(EmbeddingRequest.parse(fields))

    return serve(say(), ask)


def test_embeddings_have_length_one() -> None:
    vectors = [np.array([3, 4], np.float32), np.array([0, 0], np.float32)]
    reply = embed(vectors, input=["the", "cat"])
    assert reply.data[0].embedding == pytest.approx([0.6, 0.8])
    assert reply.data[1].embedding == [0, 0]
    assert [item.index for item in reply.data] == [0, 1]
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 0
    encoded = embed(vectors, input=["the", "cat"], encoding_format="base64").data[0].embedding
    assert isinstance(encoded, str)
    assert np.frombuffer(base64.b64decode(encoded), "<f4").tolist() == reply.data[0].embedding


def test_the_first_numbers_of_an_embedding_have_length_one_too() -> None:
    vectors = [np.array([3, 4, 12, 84], np.float32)]
    assert embed(vectors, input="the", dimensions=2).data[0].embedding == pytest.approx([0.6, 0.8])
    with pytest.raises(ApiError, match="have 4 numbers, expected 1 to 4") as info:
        embed(vectors, input="the", dimensions=5)
    assert info.value.param == "dimensions"
    with pytest.raises(ApiError, match="NaN"):
        embed(LibraryError("NaN"), input="the")
    with pytest.raises(ApiError, match="this model's prompts are none") as info:
        embed(vectors, input="the", prompt_name="query")
    assert info.value.param == "prompt_name"


def test_tokens_of_texts_and_messages() -> None:
    async def ask(service: ApiService, engine: ScriptedEngine) -> None:
        tokens = await service.tokenize(
            TokenizeRequest.parse({"prompt": "the cat", "return_token_strs": True})
        )
        assert tokens.count == len(tokens.tokens) == len(tokens.token_strs or ())
        assert tokens.max_model_len == 128
        text = await service.detokenize(DetokenizeRequest.parse({"tokens": tokens.tokens}))
        assert text.prompt == "the cat"
        messages = [{"role": "user", "content": "Hello"}]
        chat = await service.tokenize(TokenizeRequest.parse({"messages": messages}))
        text = await service.detokenize(DetokenizeRequest.parse({"tokens": chat.tokens}))
        assert text.prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        with pytest.raises(ApiError) as info:
            await service.detokenize(DetokenizeRequest.parse({"tokens": [1, 300]}))
        assert info.value.param == "tokens[1]"

    serve(say(), ask)
