"""ChatModule on a tiny random model: conversations and the cache, benchmarks, embeddings."""

import numpy as np
import pytest

from relaxlm import ChatModule, GenerationConfig
from relaxlm.errors import ContextOverflowError, RequestError
from relaxlm.runtime.generation import SamplingState
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.sampling import sample
from relaxlm.runtime.sequence_table import PagedSequences
from tests.numpy_llama import llama_logits
from tests.runtime.chatting import GREEDY, free_pages, say
from tests.tiny_model import CONFIG, TOKENS

# Conversations


def test_a_reply_is_that_of_the_reference(chat, tiny):
    chat.generate("hello", GREEDY)
    ids = chat.prompts.encode([say("user", "hello")])
    for token in chat.replies[0].tokens:
        logits = llama_logits(tiny.weights, CONFIG, ids)[-1]
        assert token == int(logits[:TOKENS].argmax())
        ids.append(token)


def test_later_turns_reuse_the_cache_and_say_what_a_fresh_module_says(chat, load, digits):
    fresh, held = load(), 0
    for question in ("hello world", "the cat?", "answer!"):
        reply = chat.generate(question, digits)
        fresh.reset_chat()
        assert fresh.generate(chat.messages[:-1], digits) == reply
        assert chat.replies[0].tokens == fresh.replies[0].tokens
        assert fresh.timings.reused_tokens == 0
        assert chat.timings.reused_tokens == held
        # All of this turn but the last token, which has not been run.
        held = chat.timings.prompt_tokens + len(chat.replies[0].tokens) - 1
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3


def test_a_prompt_that_differs_in_the_middle_reuses_what_comes_before(chat, load, digits):
    chat.generate([say("system", "the cat sat on the mat"), say("user", "hello")], digits)
    messages = [say("system", "the cat sat on the mat"), say("user", "no, another")]
    reply = chat.generate(messages, digits)
    shared = len(chat.prompts.encode(messages[:1], add_generation_prompt=False))
    assert shared <= chat.timings.reused_tokens < chat.timings.prompt_tokens - 3
    assert reply == load().generate(messages, digits)


def test_the_same_prompt_again_runs_its_last_token_only(chat):
    first = chat.generate("hello", GREEDY, stateless=True)
    assert chat.generate("hello", GREEDY, stateless=True) == first
    assert chat.timings.reused_tokens == chat.timings.prompt_tokens - 1


def test_stateless_leaves_the_conversation_as_it_is(chat, load, digits):
    chat.generate("hello", digits)
    before = list(chat.messages)
    other = chat.generate("the dog ran", digits, stateless=True)
    assert chat.messages == before
    assert other == load().generate("the dog ran", digits)
    expected = load().generate([*before, say("user", "and?")], digits)
    assert chat.generate("and?", digits) == expected


def test_a_list_of_messages_takes_the_place_of_the_conversation(chat):
    chat.generate("hello", GREEDY)
    messages = [say("system", "answer"), say("user", "a"), say("assistant", "b"), say("user", "c")]
    reply = chat.generate(messages, GREEDY)
    assert chat.messages == [*messages, say("assistant", reply)]


def test_reset_forgets_messages_and_pages(chat):
    chat.generate("hello", GREEDY)
    assert free_pages(chat) < chat.sequences.pool.total
    chat.reset_chat()
    assert (chat.messages, free_pages(chat)) == ([], chat.sequences.pool.total)


def test_several_replies_equal_separate_choices(chat, tiny):
    config = GenerationConfig(n=3, seed=11, max_tokens=10)
    texts = chat.generate("hello", config)
    assert texts == [reply.text for reply in chat.replies]
    assert chat.messages[-1] == say("assistant", texts[0])
    prompt = chat.prompts.encode([say("user", "hello")])
    for choice, reply in enumerate(chat.replies):
        ids, state = list(prompt), SamplingState(config, prompt, TOKENS, choice)
        while len(ids) < len(prompt) + len(reply.tokens):
            logits = llama_logits(tiny.weights, CONFIG, ids)[-1:].astype(np.float32)
            ids.append(sample(logits, [state])[0].token)
        assert reply.tokens == ids[len(prompt) :]
    chat.sequences.check()
    chat.reset_chat()
    assert free_pages(chat) == chat.sequences.pool.total


def test_as_many_replies_as_possible_fit_into_a_full_context(chat):
    settings = {"n": chat.max_replies, "ignore_eos": True, "seed": 1}
    chat.generate("hello world, " * 9, settings)
    room = (chat.context_window_size - chat.timings.prompt_tokens) // chat.max_replies
    assert [len(reply.tokens) for reply in chat.replies] == [room] * chat.max_replies
    chat.sequences.check()


def test_there_are_pages_for_as_many_replies_as_possible_to_any_prompt(chat):
    for prompt in range(1, 256):
        for n in (1, 2, 3, 6, 11, chat.max_replies):
            sequences = PagedSequences(PagePool(chat.executor.pages), 16)
            seqs = [sequences.add()]
            sequences.append(seqs[0], prompt)
            seqs += [sequences.fork(seqs[0]) for _ in range(n - 1)]
            # The last token of a reply is not run. Steps of 1 take the same pages as one step.
            for steps in (1, (256 - prompt) // n - 2):
                if steps > 0:
                    sequences.batch([(seq, steps) for seq in seqs])
                    sequences.take_copies()


def test_a_seed_makes_a_reply_reproducible(chat):
    one, two, other = (
        chat.generate("hello", {"seed": seed, "max_tokens": 20}, stateless=True)
        for seed in (1, 1, 2)
    )
    assert one == two != other


# Benchmarks and embeddings


def test_benchmark_generates_exactly_so_many_tokens_and_reuses_nothing(chat, digits):
    chat.generate("hello", digits)
    before = list(chat.messages)
    for _ in range(2):
        text = chat.benchmark_generate("hello world", 50)
        assert len(chat.replies[0].tokens) == 50
        assert chat.timings.reused_tokens == 0
        assert text == chat.replies[0].text
    assert chat.messages == before
    assert "tok/s" in chat.stats()


def test_a_benchmark_that_does_not_fit_is_refused(chat):
    with pytest.raises(ContextOverflowError) as raised:
        chat.benchmark_generate("hello", 256)
    assert str(raised.value) == (
        "a prompt of 3 tokens and 256 more do not fit into the context window of 256: ask for at "
        "most 253"
    )


def test_embed_text_gives_the_final_state_of_the_last_token(chat, tiny, digits):
    chat.reset_chat()
    chat.generate("hello", digits)  # the conversation's cache is in the way of a long text
    texts = ["the cat", "hello world", "the cat sat on the mat 🙂 " * 10, "the cat"]
    vectors = chat.embed_text(texts)
    assert vectors.shape == (4, 64) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    head = tiny.weights["lm_head.weight"].T
    for text, vector in zip(texts, vectors, strict=True):
        logits = llama_logits(tiny.weights, CONFIG, np.array(chat.tokenizer.encode(text)))[-1]
        cosine = (vector @ head) @ logits / np.linalg.norm(vector @ head) / np.linalg.norm(logits)
        assert cosine == pytest.approx(1, abs=1e-6)
    alone = chat.embed_text("the cat")
    np.testing.assert_allclose(alone, vectors[:1], rtol=1e-4, atol=1e-6)
    assert len(chat.sequences) <= 1
    assert chat.generate("and?", digits)  # the conversation goes on


def test_texts_that_cannot_be_embedded_are_refused(chat):
    for texts, message in (
        ("", "text 0 has no tokens, expected at least one"),
        ([], "no text to embed: expected at least one"),
        (["the cat", ""], "text 1 has no tokens, expected at least one"),
        (["the", 5], "a text to embed is a int, expected a string"),
        (5, "embed_text: a int, expected a text or a list of texts"),
    ):
        with pytest.raises(RequestError) as raised:
            chat.embed_text(texts)
        assert str(raised.value) == message
    with pytest.raises(
        ContextOverflowError, match="tokens, the context window 256: shorten it, or"
    ):
        chat.embed_text(["the cat", "cat" * 300])
    assert chat.embed_text("cat" * 300, truncate=True).shape == (1, 64)
    with pytest.raises(RequestError, match="this model's prompts are none"):
        chat.embed_text("the cat", prompt_name="query")
    with pytest.raises(RequestError, match="have 64 numbers, expected 1 to 64"):
        chat.embed_text("the cat", dimensions=65)


def test_a_part_of_a_vector_has_length_one(chat):
    whole, part = chat.embed_text("the cat"), chat.embed_text("the cat", dimensions=16)
    assert part.shape == (1, 16)
    np.testing.assert_allclose(part, whole[:, :16] / np.linalg.norm(whole[:, :16]), rtol=1e-6)


def test_stats_count_and_time(chat, digits):
    chat.generate("hello", digits)
    chat.generate("and?", digits)
    t = chat.timings
    assert chat.stats().startswith("prefill: ")
    lines = chat.stats(verbose=True).splitlines()
    assert lines[1] == (
        f"prompt: {t.prompt_tokens} tokens, {t.reused_tokens} of them from the cache; "
        "reply: 12 tokens"
    )
    assert lines[2].startswith("memory: 411 kB parameters, up to ")
    assert "(float32)" in lines[2]


def test_stats_before_any_reply(load):
    assert load().stats() == "prefill: -, decode: -"


# Libraries that are compiled on first use


def test_settings_of_the_library_take_effect_on_first_use(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RELAXLM_CACHE", str(tmp_path))
    stages: list[str] = []

    def chat() -> ChatModule:
        return ChatModule(
            tiny.folder,
            "cpu",
            {"context_window_size": 64, "kv_cache_dtype": "fp8"},
            progress=lambda stage, share: stages.append(stage),
        )

    first = chat()
    compiled = list(stages)
    assert compiled and chat().library.path == first.library.path
    assert stages == compiled
    assert first.context_window_size == 64
    assert first.library.metadata.kv_cache.dtype == "float8_e4m3"
    assert "(float8_e4m3)" in first.stats(verbose=True)
    assert len(first.generate("hello", {"max_tokens": 5, "ignore_eos": True})) > 0
