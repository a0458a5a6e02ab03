"""The engine on its threads, with a compiled model: text, cancelling, limits, ends."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from relaxlm import ChatModule, GenerationConfig
from relaxlm.engine.config import EngineConfig, plan_cache
from relaxlm.engine.core import EngineCore
from relaxlm.engine.loop import EngineLoop
from relaxlm.engine.types import GenerationRequest, Update
from relaxlm.errors import (
    BusyError,
    ConfigError,
    ContextOverflowError,
    LibraryError,
    RequestError,
)
from relaxlm.runtime.library import Library
from relaxlm.runtime.memory import available_memory, total_memory
from relaxlm.runtime.model import ServedModel
from tests.tiny_model import TOKENS, TinyModel

LIMIT = 30.0  # seconds that a test waits for anything


class Receiver:
    """What came of one request."""

    def __init__(self) -> None:
        self.updates: list[Update] = []
        self.done = threading.Event()
        self.started = threading.Event()

    def __call__(self, update: Update) -> None:
        self.updates.append(update)
        self.started.set()
        if update.finished:
            self.done.set()

    def wait(self) -> "Receiver":
        assert self.done.wait(LIMIT), "no end"
        return self

    def text(self, index: int = 0) -> str:
        return "".join(c.text for u in self.updates for c in u.choices if c.index == index)

    def tokens(self, index: int = 0) -> list[int]:
        mine = [c for u in self.updates for c in u.choices if c.index == index]
        return [token.sampled.token for choice in mine for token in choice.tokens]

    @property
    def reasons(self) -> list[Any]:
        ends = [c for u in self.updates for c in u.choices if c.finish_reason]
        return [(c.index, c.finish_reason, c.stopped_by) for c in ends]


def start(tiny: TinyModel, **config: Any) -> EngineLoop:
    return EngineLoop.load(tiny.folder, tiny.library, config=EngineConfig(**config))


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Iterator[EngineLoop]:
    with start(tiny, mode="server") as engine:
        yield engine


@pytest.fixture(scope="module")
def ask(engine: EngineLoop) -> Callable[..., Receiver]:
    def submit(text: str = "the cat", loop: EngineLoop = engine, **settings: Any) -> Receiver:
        return submit_to(loop, text, **settings)

    return submit


def submit_to(loop: EngineLoop, text: str, **settings: Any) -> Receiver:
    model, receiver = loop.model, Receiver()
    extra = {name: settings.pop(name) for name in ("prompt_logprobs",) if name in settings}
    config = model.settings(GenerationConfig(**{"temperature": 0.0, "max_tokens": 12, **settings}))
    ids = model.prompts.encode([{"role": "user", "content": text}])
    prompts = model.prompts
    request = GenerationRequest(
        ids, config, prompts.stop_token_ids, prompts.stop_strings, continuing=False, **extra
    )
    receiver.id = loop.submit(request, receiver)  # type: ignore[attr-defined]
    return receiver


def test_replies_are_those_of_a_chat(tiny, ask):
    chat = ChatModule(tiny.folder, "cpu", model_lib=tiny.library)
    texts = ["the cat", "hello world", "ran to the house and the dog sat", "größer"]
    for settings in ({}, {"temperature": 0.8, "seed": 4, "top_p": 0.9, "n": 2}):
        found = [ask(text, **settings) for text in texts]
        for text, receiver in zip(texts, found, strict=True):
            receiver.wait()
            config = {"temperature": 0.0, "max_tokens": 12, **settings}
            expected = chat.generate(text, config, stateless=True)
            expected = [expected] if isinstance(expected, str) else expected
            assert [receiver.text(i) for i in range(len(expected))] == expected
            assert [receiver.tokens(i) for i in range(len(expected))] == [
                reply.tokens for reply in chat.replies
            ]


def test_the_first_update_tells_of_the_prompt_and_the_last_of_times(ask):
    receiver = ask(max_tokens=3).wait()
    first, *_, last = receiver.updates
    assert first.prompt is not None and first.prompt.tokens == 15
    assert all(update.prompt is None for update in receiver.updates[1:])
    assert last.timings is not None and last.timings.generated_tokens == 3
    assert min(last.timings.queued, last.timings.prefill, last.timings.decode) >= 0
    assert receiver.reasons == [(0, "length", None)]
    again = ask(max_tokens=1).wait().updates[0].prompt
    assert again is not None and again.cached_tokens == 14


def test_a_stop_string_ends_text_and_tokens(ask):
    whole = ask(max_tokens=40).wait()
    stop = whole.text()[3:5]
    receiver = ask(max_tokens=40, stop=stop).wait()
    assert receiver.text() == whole.text()[: whole.text().index(stop)]
    assert receiver.reasons == [(0, "stop", stop)]
    assert receiver.tokens() == whole.tokens()[: len(receiver.tokens())]
    assert receiver.updates[-1].timings.generated_tokens == len(receiver.tokens()) < 40


def test_a_stop_token_ends_the_reply_and_is_told(engine, ask):
    token = ask(max_tokens=40).wait().tokens()[4]
    receiver = ask(max_tokens=40, stop_token_ids=[token]).wait()
    assert receiver.tokens()[-1] == token and receiver.reasons == [(0, "stop", token)]


def test_log_probabilities_come_with_the_tokens(ask):
    receiver = ask(logprobs=True, top_logprobs=3, prompt_logprobs=True).wait()
    prompt = receiver.updates[0].prompt
    assert prompt is not None and len(prompt.logprobs) == prompt.tokens - 1
    for update in receiver.updates:
        for choice in update.choices:
            for token in choice.tokens:
                assert token.sampled.top[0] == (token.sampled.token, token.sampled.logprob)
                assert len(token.sampled.top) == 3


def idle(loop: EngineLoop) -> Any:
    """Statistics once nothing runs."""
    deadline = time.monotonic() + LIMIT
    while (stats := loop.stats()).running or stats.waiting or stats.pages_used:
        assert time.monotonic() < deadline, stats
        time.sleep(0.01)
    return stats


def test_cancelling_frees_the_pages(engine, ask):
    before = engine.stats().cancelled
    receiver = ask(max_tokens=200, ignore_eos=True)
    assert receiver.started.wait(LIMIT)
    engine.cancel(receiver.id)
    receiver.wait()
    assert receiver.reasons == [(0, "cancelled", None)]
    assert idle(engine).cancelled == before + 1
    engine.cancel(receiver.id)  # too late, and no error


def test_a_receiver_that_fails_loses_its_own_request_only(engine, ask):
    model = engine.model

    def fail(update: Update) -> None:
        raise OSError("nobody there")

    ids = model.prompts.encode([{"role": "user", "content": "hello"}])
    config = model.settings(GenerationConfig(max_tokens=200, ignore_eos=True))
    engine.submit(GenerationRequest(ids, config), fail)
    assert ask().wait().reasons
    idle(engine)


@pytest.mark.parametrize(
    ("prompt", "settings", "error", "message"),
    [
        ([], {}, RequestError, "no tokens"),
        ([5, TOKENS], {}, RequestError, f"token id {TOKENS}"),
        ([5] * 256, {}, ContextOverflowError, "256 tokens, the context window 256"),
        ([5], {"logit_bias": {TOKENS: 1.0}}, RequestError, "logit_bias"),
    ],
)
def test_requests_that_cannot_be_are_refused_at_once(engine, prompt, settings, error, message):
    config = GenerationConfig(**settings)
    with pytest.raises(error, match=message):
        engine.submit(GenerationRequest(prompt, config), lambda update: None)


def test_vectors_are_the_final_states_at_the_last_token(tiny, engine):
    prompts = [[5, 9, 200, 31], [7], [40] * 100]
    found: list[Any] = []
    done = threading.Event()

    def deliver(result: Any) -> None:
        found.append(result)
        done.set()

    engine.embed(prompts, deliver)
    assert done.wait(LIMIT)
    from tests.numpy_llama import llama_logits
    from tests.tiny_model import CONFIG

    for ids, vector in zip(prompts, found[0], strict=True):
        logits = vector @ tiny.weights["lm_head.weight"].T
        expected = llama_logits(tiny.weights, CONFIG, np.array(ids))[-1]
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(RequestError, match="text 1 has no tokens"):
        engine.embed([[5], []], deliver)
    with pytest.raises(ContextOverflowError, match="text 0 has 300 tokens"):
        engine.embed([[5] * 300], deliver)


def test_too_many_requests_are_refused_and_the_others_served(tiny):
    with start(tiny, mode="interactive", max_waiting=2) as loop:
        receivers = [submit_to(loop, "the cat", max_tokens=60, ignore_eos=True) for _ in range(3)]
        with pytest.raises(BusyError, match="2 may wait") as caught:
            submit_to(loop, "the dog")
        assert caught.value.retry_after >= 1 and not caught.value.closing
        for receiver in receivers:
            receiver.wait()
        submit_to(loop, "the dog").wait()
        with pytest.raises(RequestError, match="at most 1 replies"):
            submit_to(loop, "the dog", n=2)


def test_closing_drains_then_cancels(tiny):
    loop = start(tiny)
    short = submit_to(loop, "the cat", max_tokens=3)
    loop.close(drain=LIMIT)
    assert short.done.is_set() and short.reasons[0][1] in ("length", "stop")
    with pytest.raises(BusyError, match="closing") as caught:
        submit_to(loop, "the dog")
    assert caught.value.closing

    loop = start(tiny)
    long = submit_to(loop, "the cat", max_tokens=200, ignore_eos=True)
    assert long.started.wait(LIMIT)
    loop.close()
    assert long.done.is_set() and long.reasons == [(0, "cancelled", None)]


def test_an_error_of_the_engine_itself_reaches_every_request(tiny, monkeypatch):
    def broken(self: EngineCore) -> None:
        raise ZeroDivisionError("never foreseen")

    with start(tiny) as loop:
        first = submit_to(loop, "the cat", max_tokens=200, ignore_eos=True)
        assert first.started.wait(LIMIT)
        monkeypatch.setattr(EngineCore, "step", broken)
        first.wait()
        assert "never foreseen" in str(first.updates[-1].error)
        assert loop.failure is first.updates[-1].error
        with pytest.raises(LibraryError, match="the engine has failed"):
            submit_to(loop, "the cat")
        with pytest.raises(LibraryError, match="the engine has failed"):
            loop.embed([[5]], lambda result: None)


def test_what_a_library_or_the_memory_does_not_hold_is_refused(tiny):
    info = Library.load(tiny.library).metadata
    for config, message in (
        ({"max_batch_size": 200}, "compiled for 128"),
        ({"context_window_size": 999}, "compiled for 256"),
        ({"context_window_size": 100, "kv_cache_tokens": 50}, "smaller context_window_size"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size = 2 is less than"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_cache(info, EngineConfig(**config))
    with pytest.raises(ConfigError, match="of memory are left"):
        plan_cache(info, EngineConfig(), memory=info.memory.params)
    with pytest.raises(ConfigError, match="mode"):
        EngineConfig(mode="fast")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="batch_invariant=1"):
        start(tiny, batch_invariant=True)
    # Without a wish of its own, the context is as long as the cache.
    assert plan_cache(info, EngineConfig(kv_cache_tokens=64)).context == 64


def test_guesses_are_made_on_a_library_that_they_cannot_sway(tiny, monkeypatch):
    options: list[Any] = []

    def load(folder, device, chat_config, model_lib, progress, opt):
        options.append(opt)
        raise ConfigError("seen")

    monkeypatch.setattr(ServedModel, "load", load)
    for config, opt, expected in (
        ({}, None, None),
        ({"speculative": "ngram"}, None, "batch_invariant=1"),
        ({"speculative": "ngram"}, "act_quant=0", "act_quant=0;batch_invariant=1"),
        ({"speculative": "ngram", "batch_invariant": False}, None, None),
        ({"batch_invariant": True}, None, "batch_invariant=1"),
    ):
        with pytest.raises(ConfigError, match="seen"):
            EngineLoop.load(tiny.folder, None, "cpu", EngineConfig(**config), opt=opt)
        assert options.pop() == expected


def test_modes_differ_in_how_many_replies_are_written_at_a_time(tiny):
    info = Library.load(tiny.library).metadata
    plans = [plan_cache(info, EngineConfig(mode=m)) for m in ("interactive", "local", "server")]
    assert [plan.limits.sequences for plan in plans] == [1, 4, 128]
    assert [plan.cache.pages for plan in plans] == [17, 4 * 17, 128 * 17]


def test_memory_of_the_machine():
    total, available = total_memory(), available_memory()
    if total is None or available is None:
        pytest.skip("the system doesn't tell")
    assert 0 < available <= total
