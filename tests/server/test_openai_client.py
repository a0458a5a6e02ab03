"""The official client against a running server."""

import json
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from relaxlm.engine.loop import EngineLoop
from relaxlm.server.app import ApiServer
from relaxlm.server.settings import ServerSettings
from tests.server.serving import Running, running, wait_until

HELLO = [{"role": "user", "content": "hello world"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"enum": [1, 2]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["here", "there"]}},
            "required": ["place"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


@pytest.fixture(scope="module")
def client(tiny_server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: OpenAI, **settings: object) -> object:
    given = {"model": "any", "messages": HELLO, "temperature": 0, "max_tokens": 8, **settings}
    return client.chat.completions.create(**given)  # type: ignore[call-overload]


def test_chat(client: OpenAI) -> None:
    reply = ask(client)
    assert reply.object == "chat.completion" and reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 8
    assert reply._request_id.startswith("req_")
    again = ask(client)
    assert again.choices[0].message.content == reply.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_a_stream_says_the_same(client: OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    text = "".join(chunk.choices[0].delta.content or "" for chunk in parts)
    assert text == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices[0].finish_reason == "length"
    assert not last.choices and last.usage.completion_tokens == 8
    assert len({chunk.id for chunk in chunks}) == 1


def test_n_replies_with_seeds(client: OpenAI) -> None:
    settings = {"n": 3, "temperature": 1.0, "seed": 7}
    one, other = ask(client, **settings), ask(client, **settings)
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in other.choices]
    assert len(set(texts)) > 1 and [choice.index for choice in one.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in ask(client, stream=True, **settings):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_stop_as_a_string_and_as_a_list(client: OpenAI) -> None:
    text = ask(client, max_tokens=20).choices[0].message.content
    stop = text[5:7]
    for given in (stop, [stop, "never to be seen"]):
        choice = ask(client, max_tokens=20, stop=given).choices[0]
        assert choice.message.content == text[: text.index(stop)]
        assert choice.finish_reason == "stop"


def test_logprobs(client: OpenAI) -> None:
    reply = ask(client, logprobs=True, top_logprobs=3, max_tokens=5)
    tokens = reply.choices[0].logprobs.content
    assert len(tokens) == 5
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs)
    data = b"".join(bytes(token.bytes) for token in tokens)
    assert data.decode(errors="replace") == reply.choices[0].message.content


def test_a_json_schema_is_kept_to(client: OpenAI) -> None:
    schema = {"name": "person", "schema": PERSON, "strict": True}
    settings = {
        "response_format": {"type": "json_schema", "json_schema": schema},
        "temperature": 1.0,
        "seed": 3,
        "max_tokens": 60,
    }
    reply = ask(client, **settings)
    person = json.loads(reply.choices[0].message.content)
    assert set(person) == {"name", "age"} and person["age"] in (1, 2)
    parts = ask(client, stream=True, **settings)
    text = "".join(c.delta.content or "" for chunk in parts for c in chunk.choices)
    assert text == reply.choices[0].message.content


def test_a_tool_that_must_be_called_is_called(tool_server: Running) -> None:
    with OpenAI(base_url=f"{tool_server.url}/v1", api_key="none", max_retries=0) as client:
        call_a_tool(client)


def call_a_tool(client: OpenAI) -> None:
    settings = {
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "temperature": 1.0,
        "seed": 5,
        "max_tokens": 100,
    }
    choice = ask(client, **settings).choices[0]
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["place"] in ("here", "there")
    pieces = [
        part
        for chunk in ask(client, stream=True, **settings)
        for c in chunk.choices
        for part in c.delta.tool_calls or ()
    ]
    assert pieces[0].function.name == "weather" and pieces[0].id
    joined = "".join(part.function.arguments or "" for part in pieces)
    assert json.loads(joined) == json.loads(call.function.arguments)
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call.model_dump(exclude_none=True)]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    answer = ask(client, messages=messages, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls


def test_completions_with_echo(client: OpenAI) -> None:
    reply = client.completions.create(
        model="any", prompt="the cat sat", max_tokens=4, temperature=0, echo=True, logprobs=2
    )
    (choice,) = reply.choices
    assert choice.text.startswith("the cat sat")
    assert len(choice.logprobs.tokens) == reply.usage.total_tokens
    assert choice.logprobs.token_logprobs[0] is None
    several = client.completions.create(model="any", prompt=["the", "dog"], max_tokens=2)
    assert [choice.index for choice in several.choices] == [0, 1]


def test_embeddings(client: OpenAI) -> None:
    reply = client.embeddings.create(model="any", input=["the cat", "the dog", "the cat"])
    vectors = [item.embedding for item in reply.data]
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-6) and vectors[0] != vectors[1]
    assert len(vectors[0]) == 64 and reply.usage.prompt_tokens > 0


def test_responses(client: OpenAI) -> None:
    settings = {"model": "any", "input": "hello", "temperature": 0, "max_output_tokens": 8}
    reply = client.responses.create(**settings)
    assert reply.object == "response" and reply.output_text
    events = list(client.responses.create(stream=True, **settings))
    assert events[0].type == "response.created"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == reply.output_text


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == "tiny-q0f32" and client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError, match="'other' is not here"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 100}, None),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"extra_body": {"colour": "red"}}, "colour"),
        ({"audio": {"voice": "alloy", "format": "mp3"}}, "audio"),
        ({"response_format": {"type": "json_schema"}}, None),
        ({"logit_bias": {"300": 1}}, None),
        ({"stop": ["x"] * 1000}, "stop"),
    ],
)
def test_what_is_not_possible_is_a_bad_request(client: OpenAI, settings: dict, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **settings)
    assert caught.value.type == "invalid_request_error"
    if param:
        assert caught.value.param == param


def test_a_prompt_that_is_too_long_is_told_so(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, messages=[{"role": "user", "content": "the cat " * 500}])
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("word", ["refuse", "crash"])
def test_a_template_that_fails_does_not_touch_others(tool_server: Running, word: str) -> None:
    with OpenAI(base_url=f"{tool_server.url}/v1", api_key="none", max_retries=0) as client:
        alone = ask(client, max_tokens=100).choices[0].message.content
        stream = iter(ask(client, stream=True, max_tokens=100))
        first = next(stream)
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, messages=[{"role": "user", "content": word}])
        assert caught.value.code == "template_error"
        chunks = [first, *stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == alone


def test_a_key_and_the_name_of_the_model_may_be_demanded(engine: EngineLoop) -> None:
    settings = ServerSettings(api_keys=("secret",), strict_model_name=True, model_name="mine")
    with running(ApiServer(engine, settings)) as server:
        url = f"{server.url}/v1"
        with OpenAI(base_url=url, api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                ask(client)
        with OpenAI(base_url=url, api_key="secret") as client:
            with pytest.raises(openai.NotFoundError) as caught:
                ask(client, model="other")
            assert caught.value.code == "model_not_found"
            assert ask(client, model="mine").model == "mine"


def test_a_full_queue_is_a_rate_limit(client: OpenAI, tiny_server: Running) -> None:
    streams = []
    try:
        with pytest.raises(openai.RateLimitError) as caught:
            for _ in range(40):
                streams.append(ask(client, stream=True, max_tokens=200))
        assert int(caught.value.response.headers["retry-after"]) >= 1
    finally:
        for stream in streams:
            stream.close()
    wait_until(lambda: not tiny_server.server.server_state.tasks)


def test_pages_are_free_soon_after_a_client_leaves(client: OpenAI, tiny_server: Running) -> None:
    def in_use() -> dict[str, float]:
        text = tiny_server.api.metrics.text().decode()
        lines = (line.split() for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    wait_until(lambda: in_use()["relaxlm_kv_pages_used"] == 0)
    cancelled = in_use()['relaxlm_requests_total{outcome="cancelled"}']
    stream = ask(client, stream=True, max_tokens=240)
    next(iter(stream))
    stream.close()
    wait_until(lambda: in_use()['relaxlm_requests_total{outcome="cancelled"}'] == cancelled + 1)
    wait_until(lambda: in_use()["relaxlm_kv_pages_used"] == 0)
