"""The engine on compiled models with recurrent layers: replies, vectors, and what is kept."""

import queue
from collections.abc import Iterator

import numpy as np
import pytest

from relaxlm import ChatModule
from relaxlm.engine.config import EngineConfig
from relaxlm.engine.loop import EngineLoop
from relaxlm.errors import ConfigError
from tests.engine.test_loop import LIMIT, start, submit_to
from tests.tiny_model import TinyModel

LONG = "the cat sat on the mat and the dog ran to the house and "


@pytest.fixture(scope="module", params=["hybrid", "recurrent"])
def model(request: pytest.FixtureRequest) -> TinyModel:
    return request.getfixturevalue(f"{request.param}_tiny")


@pytest.fixture(scope="module")
def engine(model: TinyModel) -> Iterator[EngineLoop]:
    with start(model, mode="local", max_batch_size=3) as engine:
        yield engine


@pytest.fixture(scope="module")
def chat(model: TinyModel) -> ChatModule:
    return ChatModule(model.folder, "cpu", model_lib=model.library)


def test_replies_of_many_requests_are_those_of_a_chat(engine, chat) -> None:
    texts = ["the cat", "hello world", LONG, "größer", LONG + "sat", "ran"]
    for settings in ({}, {"temperature": 0.8, "seed": 4, "n": 2}):
        found = [submit_to(engine, text, **settings) for text in texts]
        for text, receiver in zip(texts, found, strict=True):
            receiver.wait()
            chat.generate(text, {"temperature": 0.0, "max_tokens": 12, **settings}, stateless=True)
            for index, reply in enumerate(chat.replies):
                assert receiver.tokens(index) == reply.tokens, text


def test_texts_are_embedded_beside_as_many_replies_as_there_are(engine, chat) -> None:
    found = [submit_to(engine, text, max_tokens=30, ignore_eos=True) for text in (LONG, "a", "b")]
    vectors: queue.SimpleQueue = queue.SimpleQueue()
    texts = [chat.tokenizer.encode(text) for text in ("the cat sat", LONG, "größer")]
    engine.embed(texts, vectors.put)
    result = vectors.get(timeout=LIMIT)
    for receiver in found:
        receiver.wait()
    for text, vector in zip(("the cat sat", LONG, "größer"), result, strict=True):
        expected = chat.embed_text(text)[0]
        np.testing.assert_allclose(vector / np.linalg.norm(vector), expected, 1e-4, 1e-5)


def test_another_reply_goes_on_in_front_of_its_beginning(engine) -> None:
    text = LONG * 4
    first = submit_to(engine, text, max_tokens=5).wait()
    again = submit_to(engine, text, max_tokens=5).wait()
    assert again.tokens() == first.tokens()
    told = again.updates[0].prompt
    assert told is not None and told.cached_tokens == told.tokens - 16


def test_guesses_are_refused(model) -> None:
    with pytest.raises(ConfigError, match="have no state to go back to: leave it out"):
        EngineLoop.load(model.folder, model.library, config=EngineConfig(speculative="ngram"))
