"""ChatModule on a tiny random model: conversations that outgrow the context window."""

import pytest

from relaxlm import ChatConfig
from relaxlm.errors import ContextOverflowError, RequestError
from tests.numpy_llama import llama_logits
from tests.runtime.chatting import GREEDY, say
from tests.tiny_model import CONFIG, compile_library


def test_a_full_context_forgets_the_oldest_turns(chat, digits):
    system = say("system", "the cat")
    chat.messages = [system]
    forgotten = []
    for turn in range(8):
        chat.generate(f"question {turn} hello world", digits)
        forgotten.append(chat.forgotten_messages)
        assert chat.messages[0] == system
        assert chat.messages[-2] == say("user", f"question {turn} hello world")
        assert len(chat.prompts.encode(chat.messages)) < 256
    assert forgotten[0] == 0
    assert set(forgotten) == {0, 2}  # whole turns
    # What is left is as if it had been all there ever was.
    assert [m["role"] for m in chat.messages] == [
        "system",
        *["user", "assistant"] * ((len(chat.messages) - 1) // 2),
    ]
    chat.sequences.check()


def test_the_other_policy_is_an_error_and_keeps_the_conversation(load, digits):
    chat = load(chat_config=ChatConfig(context_overflow="error"))
    with pytest.raises(ContextOverflowError) as raised:
        for turn in range(20):
            before = list(chat.messages)
            chat.generate(f"question {turn} hello world", digits)
    tokens = len(chat.prompts.encode([*before, say("user", f"question {turn} hello world")]))
    assert tokens >= 256
    assert str(raised.value) == (
        f"the prompt has {tokens} tokens, the context window 256: shorten the prompt, or compile "
        'with a larger --overrides "context_window_size=..." if the model allows it'
    )
    assert chat.messages == before
    assert chat.forgotten_messages == 0


def test_one_message_that_is_too_long_is_an_error_under_either_policy(chat):
    chat.generate("hello", GREEDY)
    before = list(chat.messages)
    with pytest.raises(ContextOverflowError, match=r"^the prompt has \d+ tokens, the context"):
        chat.generate("hello " * 300, GREEDY)
    assert chat.messages == before
    chat.generate("hello", GREEDY)


def test_a_reply_ends_where_the_context_does(chat):
    chat.generate("hello world " * 12, {"ignore_eos": True, "seed": 3})
    tokens = chat.timings.prompt_tokens + len(chat.replies[0].tokens)
    assert tokens == chat.context_window_size == 256
    assert chat.replies[0].finish_reason == "length"


def test_a_smaller_context_than_the_librarys(load):
    chat = load(chat_config={"context_window_size": 100})
    assert chat.executor.pages < load().executor.pages
    chat.generate("hello", {"ignore_eos": True, "seed": 3})
    assert chat.timings.prompt_tokens + len(chat.replies[0].tokens) == 100


def test_a_sliding_window_goes_on_for_ever_in_constant_space(tiny, load, tmp_path, digits):
    window, sinks = 40, 4
    library = compile_library(
        tiny.folder,
        tmp_path / "window.so",
        f"sliding_window_size={window};attention_sink_size={sinks};context_window_size=64;"
        "prefill_chunk_size=32",
    )
    chat = load(library=library)
    chat.generate("hello world " * 15, {**digits, "max_tokens": 300, "ignore_eos": True})
    tokens = [*chat.prompts.encode(chat.messages[:1]), *chat.replies[0].tokens]
    assert len(tokens) > 400
    logits = llama_logits(tiny.weights, CONFIG, tokens, window, sinks)
    allowed = list(digits["logit_bias"])
    expected = [allowed[i] for i in logits[:, allowed].argmax(-1)]
    assert tokens[-300:] == expected[-301:-1]
    assert chat.sequences.pool.used <= 1 + 40 // 16 + 2
    with pytest.raises(RequestError) as raised:
        chat.generate("a", {"n": 2})
    assert str(raised.value) == (
        "n = 2: at most 1 at a time with a sliding window; ask several times"
    )
    held = len(tokens) - 1
    reply = chat.generate("and?", digits)
    assert chat.timings.reused_tokens == held
    assert reply == load(library=library).generate(chat.messages[:-1], digits)
    # Much of the first message has left the cache: it is computed again.
    chat.generate(chat.messages[:1], digits)
    assert chat.timings.reused_tokens == 0
    chat.sequences.check()
