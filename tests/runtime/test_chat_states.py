"""ChatModule on tiny random models with recurrent layers: what comes back is what was computed."""

from typing import Any

import numpy as np
import pytest

from relaxlm import ChatConfig, ChatModule
from tests.runtime.chatting import GREEDY, Recorder, say
from tests.tiny_model import TinyModel

CONTEXT = 256


@pytest.fixture(scope="module", params=["hybrid", "recurrent"])
def model(request: pytest.FixtureRequest) -> TinyModel:
    return request.getfixturevalue(f"{request.param}_tiny")


@pytest.fixture(scope="module")
def modules(model: TinyModel) -> tuple[ChatModule, ChatModule]:
    config = ChatConfig(context_window_size=CONTEXT)
    one, other = (ChatModule(model.folder, "cpu", config, model.library) for _ in range(2))
    return one, other


@pytest.fixture
def chat(modules: tuple[ChatModule, ChatModule]) -> ChatModule:
    modules[0].reset_chat()
    return modules[0]


@pytest.fixture
def fresh(modules: tuple[ChatModule, ChatModule]):
    """What a module says that has nothing in its cache."""

    def say_anew(messages: list[dict[str, str]], settings: dict[str, Any]) -> Any:
        modules[1].reset_chat()
        reply = modules[1].generate(messages, settings)
        assert modules[1].timings.reused_tokens == 0
        return reply

    return say_anew


def stable(chat: ChatModule, messages: list[dict[str, str]]) -> int:
    """A prompt's tokens before the reply's own beginning."""
    return len(chat.prompts.encode(messages, add_generation_prompt=False))


def check(chat: ChatModule) -> None:
    chat.sequences.check()
    assert chat.sequences.states is not None


def test_replies_that_come_back_in_the_same_tokens_go_on_where_they_ended(chat, digits, fresh):
    held = 0
    for question in ("hello world", "the cat?", "answer!"):
        reply = chat.generate(question, digits)
        assert fresh(chat.messages[:-1], digits) == reply
        assert chat.timings.reused_tokens == held
        held = chat.timings.prompt_tokens + len(chat.replies[0].tokens) - 1
        check(chat)


def test_another_reply_to_the_same_messages_starts_in_front_of_its_beginning(chat, fresh):
    messages = [say("user", "the cat sat on the mat")]
    first = chat.generate(messages, GREEDY)
    for _ in range(3):
        assert chat.generate(messages, GREEDY) == first == fresh(messages, GREEDY)
        assert chat.timings.reused_tokens == stable(chat, messages)
        check(chat)


def test_a_changed_reply_is_computed_from_where_it_begins(chat, fresh):
    chat.generate("hello", GREEDY)
    messages = [say("user", "hello"), say("assistant", "something else"), say("user", "and?")]
    reply = chat.generate(messages, GREEDY)
    assert chat.timings.reused_tokens == stable(chat, messages[:1])
    assert reply == fresh(messages, GREEDY)


def test_a_changed_message_goes_back_to_the_prompt_before(chat, digits, fresh):
    chat.generate("hello", digits)
    chat.generate("and?", digits)
    messages = [*chat.messages[:2], say("user", "no: the dog!")]
    reply = chat.generate(messages, digits)
    assert chat.timings.reused_tokens == stable(chat, messages[:1])
    assert reply == fresh(messages, digits)
    other = [say("user", "the dog"), *messages[1:]]
    assert chat.generate(other, digits) == fresh(other, digits)
    assert chat.timings.reused_tokens == 0  # it keeps no state as early as that
    check(chat)


def test_several_replies_begin_with_one_state(chat, fresh):
    messages = [say("user", "hello world")]
    settings = {"n": 3, "seed": 11, "max_tokens": 10}
    texts = chat.generate(messages, settings)
    assert len(set(texts)) == 3 and fresh(messages, settings) == texts
    check(chat)
    assert len(chat.sequences) == 1
    following = [*messages, say("assistant", texts[0]), say("user", "go on")]
    assert chat.generate(following, GREEDY) == fresh(following, GREEDY)


def test_a_reply_that_was_cut_short_can_be_gone_on_from(chat, digits, fresh):
    recorder = Recorder()
    recorder.on_text = lambda text: recorder.cancel() if len(recorder.pieces) == 4 else None
    chat.generate("hello", digits, recorder)
    reply = chat.generate("and?", digits)
    assert chat.timings.reused_tokens > stable(chat, chat.messages[:1])
    assert reply == fresh(chat.messages[:-1], digits)


def test_what_is_left_of_a_full_context_is_computed_anew(chat, digits, fresh):
    forgotten = []
    for turn in range(8):
        reply = chat.generate(f"question {turn} hello world", digits)
        forgotten.append(chat.forgotten_messages)
        assert reply == fresh(chat.messages[:-1], digits)
        assert bool(chat.timings.reused_tokens) == (turn > 0 and not chat.forgotten_messages)
    assert set(forgotten) == {0, 2}
    check(chat)


def test_a_prompt_may_be_longer_than_a_step(chat, fresh):
    chat.executor.limits, before = (
        chat.executor.limits.model_copy(update={"prefill_chunk_size": 16}),
        chat.executor.limits,
    )
    try:
        messages = [say("user", "the cat sat on the mat and the dog ran to the house " * 3)]
        assert chat.generate(messages, GREEDY) == fresh(messages, GREEDY)
        assert chat.generate(messages, GREEDY) == fresh(messages, GREEDY)
        assert chat.timings.reused_tokens == stable(chat, messages)
    finally:
        chat.executor.limits = before


def test_texts_are_embedded_beside_the_conversation(chat, digits, fresh):
    chat.generate("hello", digits)
    together = chat.embed_text(["the cat", "the dog ran to the house"])
    np.testing.assert_allclose(together[1], chat.embed_text("the dog ran to the house")[0], 1e-5)
    reply = chat.generate("and?", digits)
    assert chat.timings.reused_tokens > 0
    assert reply == fresh(chat.messages[:-1], digits)


def test_memory_counts_states(chat):
    info = chat.library.metadata
    memory = chat.executor.memory()
    assert memory.states == chat.executor.state_slots * info.state.bytes_per_sequence
    assert sum(state.numpy().nbytes for state in chat.executor._states) == memory.states
    assert memory.total == memory.params + memory.kv_cache + memory.states + memory.temporary
    line = chat.stats(verbose=True).splitlines()[2]
    assert "recurrent states" in line
    assert ("KV cache" in line) == bool(info.kv_cache.tensors) == bool(memory.kv_cache)


def test_reset_gives_everything_back(chat):
    chat.generate("hello", GREEDY)
    chat.reset_chat()
    assert chat.sequences.pool.used == chat.sequences.states.pool.used == 0
