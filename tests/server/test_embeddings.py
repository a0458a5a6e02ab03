"""A server with an embedding model: vectors, tokens, and no replies."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from relaxlm.engine.config import EngineConfig
from relaxlm.engine.loop import EngineLoop
from relaxlm.errors import ConfigError
from relaxlm.server.app import ApiServer
from relaxlm.server.settings import ServerSettings
from tests.server.serving import Running, running
from tests.tiny_embedder import LONGEST, TinyEmbedder

TEXTS = ["the cat", "hello world : the dog ran to the house", "x"]


@pytest.fixture(scope="module")
def server(tiny_encoder: TinyEmbedder) -> Iterator[Running]:
    with EngineLoop.load(tiny_encoder.folder, tiny_encoder.library, threads=1) as engine:
        with running(ApiServer(engine, ServerSettings())) as started:
            yield started


def embed(server: Running, input: Any, status: int = 200, **fields: Any) -> dict:
    response = httpx.post(f"{server.url}/v1/embeddings", json={"input": input, **fields})
    assert response.status_code == status, response.text
    return response.json()


def vectors(reply: dict) -> np.ndarray:
    return np.array([item["embedding"] for item in reply["data"]])


def test_vectors_of_texts_and_of_token_ids(server, tiny_encoder) -> None:
    expected = tiny_encoder.vectors(TEXTS)
    ids = [tiny_encoder.token_ids(text) for text in TEXTS]
    for given in (TEXTS, ids):
        reply = embed(server, given)
        np.testing.assert_allclose(vectors(reply), expected, rtol=1e-4, atol=1e-5)
        assert reply["usage"]["prompt_tokens"] == sum(map(len, ids))
    one = embed(server, "cat", prompt_name="query", dimensions=8, encoding_format="base64")
    found = np.frombuffer(base64.b64decode(one["data"][0]["embedding"]), "<f4")
    # This model's vectors are not of length 1, and neither is a part of one.
    (expected,) = tiny_encoder.vectors(["query: cat"])[:, :8]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_requests_at_the_same_time_get_their_own_vectors(server, tiny_encoder) -> None:
    texts = [" ".join(TEXTS[i % 3].split()[: 1 + i % 7]) for i in range(24)]
    expected = tiny_encoder.vectors(texts)
    with ThreadPoolExecutor(12) as clients:
        replies = list(clients.map(lambda text: embed(server, [text, "x"]), texts))
    for reply, vector in zip(replies, expected, strict=True):
        np.testing.assert_allclose(vectors(reply)[0], vector, rtol=1e-4, atol=1e-5)


def test_texts_that_are_too_long_and_other_mistakes(server, tiny_encoder) -> None:
    long = "the cat sat on the mat " * 10
    error = embed(server, ["x", long], 400)["error"]
    assert error["message"].startswith(f"text 1 has 62 tokens, the context window {LONGEST}")
    assert error["code"] == "context_length_exceeded"
    assert embed(server, long, truncate=True)["usage"]["prompt_tokens"] == LONGEST
    assert "text 0 has no tokens" in embed(server, "", 400)["error"]["message"]
    error = embed(server, "x", 400, dimensions=65)["error"]
    assert error["param"] == "dimensions" and "have 64 numbers" in error["message"]
    assert embed(server, "x", 400, prompt_name="q")["error"]["param"] == "prompt_name"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("completions", {"prompt": "Hello", "stream": True}),
        ("responses", {"input": "Hello"}),
    ],
)
def test_replies_are_refused(server, path: str, body: dict) -> None:
    response = httpx.post(f"{server.url}/v1/{path}", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "model")
    assert error["code"] == "model_not_supported"
    assert error["message"].startswith("tiny-bert-q0f32 is an embedding model: it makes vectors")


def test_tokens_and_the_model(server, tiny_encoder) -> None:
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": "the cat"}).json()
    assert tokens["tokens"] == tiny_encoder.token_ids("the cat")
    assert tokens["max_model_len"] == LONGEST
    text = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert text["prompt"] == "[CLS] the cat [SEP]"
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny-bert-q0f32", LONGEST)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert "relaxlm" in httpx.get(f"{server.url}/metrics").text


def test_what_is_for_replies_is_refused(tiny_encoder) -> None:
    for settings, message in (
        ({"speculative": "ngram", "batch_invariant": False}, "speculative decoding is for replies"),
        ({"kv_cache_tokens": 64}, "kv_cache_tokens = 64, but bert has no KV cache"),
    ):
        with pytest.raises(ConfigError, match=message):
            config = EngineConfig(**settings)
            EngineLoop.load(tiny_encoder.folder, tiny_encoder.library, config=config)
