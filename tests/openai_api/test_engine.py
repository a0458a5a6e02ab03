"""Engine and AsyncEngine on compiled models."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from relaxlm.errors import ConfigError
from relaxlm.openai_api.engine import AsyncEngine, Engine
from relaxlm.openai_api.errors import ApiError
from relaxlm.runtime.chat_module import ChatModule
from relaxlm.runtime.generation import GenerationConfig
from relaxlm.runtime.scoring import token_logits
from tests.tiny_model import CONTEXT, TOKENS, TinyModel

CAT = [{"role": "user", "content": "the cat"}]
DOG = [{"role": "user", "content": "the dog ran to the house"}]
SETTINGS: dict[str, Any] = {"n": 1, "max_tokens": 12}


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.folder, device="cpu", model_lib=tiny.library) as engine:
        yield engine


@pytest.fixture(scope="module")
def chat(tiny: TinyModel) -> ChatModule:
    return ChatModule(tiny.folder, device="cpu", model_lib=tiny.library)


def text_of(engine: Engine, messages: Any = CAT, **fields: Any) -> str | None:
    reply = engine.chat.completions.create(messages=messages, **fields)
    return reply.choices[0].message.content


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# The same as ChatModule


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0, "max_tokens": 40},
        {"temperature": 1.0, "seed": 5, "max_tokens": 40, "top_k": 20},
        {"temperature": 0.0, "max_tokens": 40, "repetition_penalty": 1.3, "logit_bias": {40: 4}},
        {"temperature": 0.0, "max_tokens": 300},
    ],
    ids=["greedy", "seeded", "penalized", "to the end of the context"],
)
def test_the_text_is_chat_modules(
    engine: Engine, chat: ChatModule, settings: dict[str, Any]
) -> None:
    chat.reset_chat()
    expected = chat.generate(CAT, GenerationConfig(**settings))
    # JSON has text as keys.
    fields = {
        **settings,
        "logit_bias": {str(k): v for k, v in settings.get("logit_bias", {}).items()},
    }
    reply = engine.chat.completions.create(messages=CAT, **fields)
    assert reply.choices[0].message.content == expected
    assert reply.usage.completion_tokens == len(chat.replies[0].tokens)
    stream = engine.chat.completions.create(messages=CAT, stream=True, **settings)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == expected


def test_log_probabilities_are_chat_modules(engine: Engine, chat: ChatModule) -> None:
    settings: dict[str, Any] = {
        "temperature": 0.0,
        "max_tokens": 8,
        "logprobs": True,
        "top_logprobs": 3,
    }
    chat.reset_chat()
    chat.generate(CAT, GenerationConfig(**settings))
    expected = chat.replies[0].logprobs
    found = engine.chat.completions.create(messages=CAT, **settings).choices[0].logprobs
    assert found is not None
    assert [entry.logprob for entry in found.content] == pytest.approx(
        [sampled.logprob for sampled in expected], abs=1e-4
    )
    for entry, sampled in zip(found.content, expected, strict=True):
        assert bytes(entry.bytes) == chat.tokenizer.token_bytes(sampled.token)
        assert [bytes(top.bytes) for top in entry.top_logprobs] == [
            chat.tokenizer.token_bytes(token) for token, _ in sampled.top
        ]


def test_an_echo_has_the_log_probabilities_of_scoring(engine: Engine, chat: ChatModule) -> None:
    ids = chat.prompts.encode_text("the cat sat on the mat")
    logits = np.concatenate(list(token_logits(chat.generator, ids)))[:-1, :TOKENS].astype(float)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = logits[np.arange(len(ids) - 1), ids[1:]]
    for prompt in ("the cat sat on the mat", ids):
        reply = engine.completions.create(prompt=prompt, echo=True, logprobs=1, max_tokens=0)
        choice = reply.choices[0]
        assert choice.text == "the cat sat on the mat"
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(list(expected), abs=1e-4)


def test_several_replies_have_random_numbers_of_their_own(engine: Engine, chat: ChatModule) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 9, "max_tokens": 10, "n": 2}
    chat.reset_chat()
    expected = chat.generate(CAT, GenerationConfig(**settings))
    reply = engine.chat.completions.create(messages=CAT, **settings)
    assert [choice.message.content for choice in reply.choices] == expected
    assert expected[0] != expected[1]


def test_stop_strings_cut_the_text(engine: Engine) -> None:
    whole = text_of(engine, temperature=0, max_tokens=30) or ""
    stop = whole[10:12]
    reply = engine.chat.completions.create(messages=CAT, temperature=0, max_tokens=30, stop=stop)
    choice = reply.choices[0]
    assert choice.message.content == whole[: whole.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert reply.usage.completion_tokens < 30


def test_the_end_of_the_context_is_a_length(engine: Engine) -> None:
    reply = engine.chat.completions.create(messages=CAT, temperature=0, ignore_eos=True)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.total_tokens == CONTEXT


# What only the engine has


def test_a_schema_is_kept_to(engine: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["a"],
        "additionalProperties": False,
    }
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(3):
        text = text_of(engine, response_format=given, seed=seed, temperature=1.5)
        assert json.loads(text or "").keys() == {"a"}
    regex = {"type": "regex", "regex": "(yes|no)!"}
    assert text_of(engine, response_format=regex) in ("yes!", "no!")


def test_prompts_run_side_by_side(engine: Engine) -> None:
    prompts = ["the cat", "the dog", "hello"]
    together = engine.completions.create(prompt=prompts, temperature=0)
    for i, prompt in enumerate(prompts):
        alone = engine.completions.create(prompt=prompt, temperature=0)
        assert alone.choices[0].text == together.choices[i].text


def test_a_prefix_is_reported_as_cached(engine: Engine) -> None:
    long = [{"role": "user", "content": "the cat sat on the mat " * 4}]
    engine.chat.completions.create(messages=long, max_tokens=1)
    usage = engine.chat.completions.create(messages=long, max_tokens=1).usage
    assert usage.prompt_tokens_details.cached_tokens > usage.prompt_tokens // 2
    assert usage.extra is not None
    assert usage.extra.ttft_s > 0


def test_embeddings_and_responses_come_from_the_model(engine: Engine) -> None:
    vectors = engine.embeddings.create(input=["the cat", "the dog"]).data
    assert len(vectors[0].embedding) == 64
    assert vectors[0].embedding != vectors[1].embedding
    response = engine.responses.create(input="the cat", temperature=0, max_output_tokens=12)
    assert response.output_text == text_of(engine, temperature=0, max_tokens=12)
    assert engine.models.list().data[0].max_model_len == CONTEXT
    assert engine.models.retrieve("tiny-q0f32").id == "tiny-q0f32"


# Threads, streams, ends


def test_many_threads_get_what_one_would(engine: Engine) -> None:
    expected = {i: text_of(engine, [CAT, DOG][i], temperature=0, max_tokens=20) for i in range(2)}
    with ThreadPoolExecutor(6) as pool:
        asked = [
            (i % 2, pool.submit(text_of, engine, [CAT, DOG][i % 2], temperature=0, max_tokens=20))
            for i in range(18)
        ]
        for which, found in asked:
            assert found.result() == expected[which]


def test_a_stream_that_is_left_ends_its_request(engine: Engine) -> None:
    cancelled = engine.stats().cancelled
    fields: dict[str, Any] = {"messages": CAT, "stream": True, "ignore_eos": True}
    with engine.chat.completions.create(**fields) as stream:
        next(stream)
    until(lambda: engine.stats().cancelled == cancelled + 1)
    for _ in engine.chat.completions.create(**fields):
        break  # and the stream is collected
    until(lambda: engine.stats().cancelled == cancelled + 2)
    until(lambda: engine.stats().running == 0)


def test_wrong_fields_are_refused_by_name(engine: Engine) -> None:
    with pytest.raises(ApiError, match="did you mean 'temperature'"):
        engine.chat.completions.create(messages=CAT, temprature=1)
    with pytest.raises(ApiError) as info:
        engine.chat.completions.create(messages=[{"role": "user", "content": "cat " * 300}])
    assert info.value.code == "context_length_exceeded"
    with pytest.raises(ApiError) as info:
        engine.completions.create(prompt=[5000])
    assert info.value.param == "prompt"


def test_tasks_ask_at_a_time_and_may_be_cancelled(tiny: TinyModel) -> None:
    async def main() -> None:
        async with AsyncEngine(tiny.folder, device="cpu", model_lib=tiny.library) as engine:
            create = engine.chat.completions.create
            alone = await create(messages=CAT, temperature=0, max_tokens=20)
            replies = await asyncio.gather(
                *(create(messages=CAT, temperature=0, max_tokens=20) for _ in range(6))
            )
            assert {reply.choices[0].message.content for reply in replies} == {
                alone.choices[0].message.content
            }
            task = asyncio.create_task(create(messages=CAT, ignore_eos=True, temperature=0))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with await create(messages=CAT, stream=True, ignore_eos=True) as stream:
                async for _ in stream:
                    break
            await engine.terminate(drain=5)
            assert engine.stats().running == 0
            with pytest.raises(ApiError) as info:
                await create(messages=CAT)
            assert (info.value.status, info.value.code) == (503, "shutting_down")

    asyncio.run(main())


def test_an_engine_that_ends_tells_those_who_wait(tiny: TinyModel) -> None:
    before = set(threading.enumerate())
    engine = Engine(tiny.folder, device="cpu", model_lib=tiny.library)
    found: list[BaseException] = []

    def ask() -> None:
        try:
            while True:
                engine.chat.completions.create(messages=CAT, ignore_eos=True)
        except ApiError as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: engine.stats().running > 0)
    engine.close()
    engine.close()
    thread.join(10)
    assert [(error.status, error.code) for error in found] == [  # type: ignore[attr-defined]
        (503, "shutting_down")
    ]
    assert set(threading.enumerate()) <= before


def test_two_modes_are_refused(tiny: TinyModel) -> None:
    with pytest.raises(ConfigError, match="mode = 'server' and engine_config has mode = 'local'"):
        Engine(tiny.folder, model_lib=tiny.library, mode="server", engine_config={"mode": "local"})
    config = {"max_batch_size": 2, "max_waiting": 3}
    with Engine(
        tiny.folder, model_lib=tiny.library, mode="interactive", engine_config=config
    ) as engine:
        assert (engine.loop.config.mode, engine.loop.config.max_waiting) == ("interactive", 3)
        assert engine.loop.config.max_batch_size == 2
