"""The generator over an executor that is easy to predict: no model, and no TVM."""

from collections.abc import Sequence

import numpy as np
import pytest

from relaxlm.errors import ContextOverflowError, LibraryError, RequestError
from relaxlm.runtime.generation import GenerationConfig, SamplingState
from relaxlm.runtime.generator import Generator, Reply
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.sampling import Sampled, sample
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.stop import StopStrings
from relaxlm.runtime.tokenizer import Tokenizer
from tests.remembering_executor import CHUNK, PAGE, RememberingExecutor, logits_after
from tests.tiny_model import TOKENS, tokenizer_json

PROMPT = [17, 40, 99, 5, 260, 31, 77, 8, 120, 4, 64]
NEVER: frozenset[int] = frozenset()


def make(pages: int = 64) -> tuple[Generator, RememberingExecutor, PagedSequences]:
    executor = RememberingExecutor(pages)
    sequences = PagedSequences(PagePool(pages), PAGE)
    tokenizer = Tokenizer(tokenizer_json().encode())
    return Generator(executor, sequences, tokenizer), executor, sequences  # type: ignore[arg-type]


def expected_tokens(config: GenerationConfig, choice: int, count: int) -> list[int]:
    """The reply by itself, without a cache."""
    state, tokens = SamplingState(config, PROMPT, TOKENS, choice), list(PROMPT)
    for _ in range(count):
        tokens.append(sample(logits_after(tokens)[None], [state])[0].token)
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("held", [0, 1, 4, 7, 10])
def test_a_reply_does_not_depend_on_how_much_of_the_prompt_is_cached(held):
    generator, executor, sequences = make()
    seq = sequences.add()
    if held:
        generator.prefill(seq, PROMPT[:held])
    executor.steps.clear()
    config = GenerationConfig(temperature=0.0)
    (reply,), timings = generator.generate(seq, PROMPT, config, NEVER, (), 9)
    assert reply.tokens == expected_tokens(config, 0, 9)
    assert (timings.prompt_tokens, timings.reused_tokens, timings.decode_tokens) == (11, held, 9)
    # In chunks, and of a cached prompt only the rest; the last token is chosen, but not run.
    new = 11 - held
    chunks = [[CHUNK], [new - CHUNK]] if new > CHUNK else [[new]]
    assert executor.steps == [*chunks, *[[1]] * 8]
    assert sequences.length(seq) == 11 + 8


def test_replies_of_a_seed_equal_separate_ones_and_their_pages_come_back():
    generator, executor, sequences = make()
    seq = sequences.add()
    config = GenerationConfig(n=3, seed=7)
    replies, timings = generator.generate(seq, PROMPT, config, NEVER, (), 20)
    texts = [tuple(reply.tokens) for reply in replies]
    assert texts == [tuple(expected_tokens(config, choice, 20)) for choice in range(3)]
    assert len(set(texts)) == 3
    assert timings.decode_tokens == 60
    assert executor.steps[2:] == [[1, 1, 1]] * 19
    sequences.check()
    assert len(sequences) == 1
    sequences.free(seq)
    assert sequences.pool.free == sequences.pool.total


def test_replies_end_one_by_one():
    generator, executor, sequences = make()
    seq = sequences.add()
    config = GenerationConfig(n=3, seed=7)
    alone = [expected_tokens(config, choice, 20) for choice in range(3)]
    ends = frozenset([alone[0][3], alone[1][8]])
    lengths = [next((i + 1 for i, t in enumerate(a) if t in ends), 20) for a in alone]
    assert len(set(lengths)) == 3 and max(lengths) == 20
    replies, _ = generator.generate(seq, PROMPT, config, ends, (), 20)
    assert [reply.tokens for reply in replies] == [
        tokens[:length] for tokens, length in zip(alone, lengths, strict=True)
    ]
    assert sorted(r.finish_reason for r in replies) == ["length", "stop", "stop"]
    running = [len(step) for step in executor.steps[2:]]
    assert running == [sum(length > i for length in lengths) for i in range(1, 20)]
    # The next turn goes on with the first reply.
    assert sequences.length(seq) == len(PROMPT) + lengths[0] - 1
    sequences.check()


def test_logits_of_padding_are_never_chosen():
    generator, _, sequences = make()
    config = GenerationConfig(temperature=3.0, seed=1)
    (reply,), _ = generator.generate(sequences.add(), PROMPT, config, NEVER, (), 100)
    assert max(reply.tokens) < TOKENS


@pytest.mark.parametrize(("config", "count"), [({}, 12), ({"max_tokens": 5}, 5)])
def test_a_reply_has_at_most_max_tokens_and_what_there_is_room_for(config, count):
    generator, _, sequences = make()
    settings = GenerationConfig(seed=3, **config)
    (reply,), _ = generator.generate(sequences.add(), PROMPT, settings, NEVER, (), 12)
    assert (len(reply.tokens), reply.finish_reason) == (count, "length")


def test_an_overflow_in_a_later_chunk_leaves_what_was_there_before():
    generator, _, sequences = make(pages=5)
    seq = sequences.add()
    generator.prefill(seq, PROMPT[:3])
    with pytest.raises(ContextOverflowError) as raised:
        generator.generate(seq, PROMPT * 2, GenerationConfig(), NEVER, (), 10)
    assert str(raised.value) == "sequence 0 needs 1 more page for 3 tokens, 0 of 5 are free"
    assert sequences.length(seq) == 3
    sequences.check()


def test_an_error_in_the_receiver_of_text_gives_the_forks_pages_back():
    generator, _, sequences = make()
    seq = sequences.add()

    def fail(reply: Reply, text: str) -> None:
        if len(reply.tokens) == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generator.generate(seq, PROMPT, GenerationConfig(n=3), NEVER, (), 9, on_text=fail)
    assert len(sequences) == 1
    sequences.check()


def test_a_wrong_request_fails_before_any_step():
    generator, executor, sequences = make()
    config = GenerationConfig(logit_bias={TOKENS: 1.0})
    with pytest.raises(RequestError) as raised:
        generator.generate(sequences.add(), PROMPT, config, NEVER, (), 9)
    assert str(raised.value) == (
        "logit_bias has token id 300: expected 0 to 299, the vocabulary of this model"
    )
    assert executor.steps == []


def test_a_cancelled_reply_ends_as_it_is_and_the_cache_holds_it():
    generator, executor, sequences = make()
    seq, texts = sequences.add(), []
    config = GenerationConfig(temperature=0.0)
    (reply,), timings = generator.generate(
        seq,
        PROMPT,
        config,
        NEVER,
        (),
        50,
        on_text=lambda reply, text: texts.append(text),
        cancelled=lambda: len(executor.steps) == 2 + 3,
    )
    assert reply.tokens == expected_tokens(config, 0, 4)
    assert (reply.finish_reason, reply.text) == ("cancelled", "".join(texts))
    assert timings.decode_tokens == 4
    assert sequences.length(seq) == len(PROMPT) + 3


def test_cancelled_in_the_prompt_there_are_replies_without_tokens():
    generator, executor, sequences = make()
    seq = sequences.add()
    replies, timings = generator.generate(
        seq, PROMPT, GenerationConfig(n=2), NEVER, (), 9, cancelled=lambda: bool(executor.steps)
    )
    assert [(r.tokens, r.text, r.finish_reason) for r in replies] == [([], "", "cancelled")] * 2
    assert (sequences.length(seq), timings.decode_tokens) == (CHUNK, 0)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_ignore_eos_is_about_the_models_own_ends(ignore_eos):
    generator, _, sequences = make()
    plain = GenerationConfig(seed=2, ignore_eos=ignore_eos)
    tokens = expected_tokens(plain, 0, 30)
    ends = frozenset(tokens[4:5])

    def length(config: GenerationConfig, end_tokens=NEVER, stop_strings=()) -> int:
        seq = sequences.add()
        (reply,), _ = generator.generate(seq, PROMPT, config, end_tokens, stop_strings, 30)
        sequences.free(seq)
        return len(reply.tokens)

    letter = generator.tokenizer.decode([t for t in tokens if t >= 3][5:6])
    assert length(plain, ends) == (30 if ignore_eos else 5)
    assert (length(plain, stop_strings=[letter]) == 30) is ignore_eos
    mine = GenerationConfig(seed=2, ignore_eos=ignore_eos, stop_token_ids=list(ends))
    assert length(mine) == 5
    assert length(GenerationConfig(seed=2, ignore_eos=ignore_eos, stop=letter)) < 30


# Replies: the text that becomes of tokens


def new_reply(
    stops: Sequence[str] = (), max_tokens: int = 1000, ends: frozenset[int] = NEVER
) -> tuple[Reply, Tokenizer]:
    tokenizer = Tokenizer(tokenizer_json().encode())
    state = SamplingState(GenerationConfig(), [], TOKENS)
    return Reply(state, tokenizer.stream(), StopStrings(stops), ends, max_tokens), tokenizer


def push(reply: Reply, tokens: Sequence[int]) -> list[str]:
    pieces = []
    for token in tokens:
        assert reply.finish_reason is None
        pieces.append(reply.push(Sampled(token, None, ())))
        if reply.finish_reason:
            break
    return pieces


TEXT = "größer 🙂🙂 日本語: STOP and STO"


@pytest.mark.parametrize("limit", range(1, 60))
def test_a_reply_cut_short_is_whole_characters(limit):
    reply, tokenizer = new_reply(max_tokens=limit)
    tokens = tokenizer.encode(TEXT)
    assert len(tokens) < 60  # some limits are beyond the end
    pieces = push(reply, tokens)
    if limit > len(tokens):
        reply.cancel()
    whole = b"".join(map(tokenizer.token_bytes, tokens[:limit])).decode(errors="ignore")
    assert reply.text == whole == "".join(pieces)
    assert reply.finish_reason == ("cancelled" if limit > len(tokens) else "length")


def test_bytes_that_are_no_character_show_when_the_model_ends_with_them():
    reply, tokenizer = new_reply(ends=frozenset([2]))
    tokens = tokenizer.encode("a 🙂")[:-1]
    assert "".join(push(reply, [*tokens, 2])) == reply.text == "a \ufffd"
    assert reply.finish_reason == "stop"


@pytest.mark.parametrize(
    "stops", [["STOP"], ["OP", "P"], [" STOP and"], ["日本"], ["\U0001f642 日", "本"]]
)
def test_no_part_of_a_stop_string_is_passed_on(stops):
    reply, tokenizer = new_reply(stops)
    pieces = push(reply, tokenizer.encode(TEXT))
    places = [TEXT.find(stop) for stop in stops]
    _, first = min((place + len(stop), place) for place, stop in zip(places, stops, strict=True))
    assert reply.text == "".join(pieces) == TEXT[:first]
    assert reply.finish_reason == "stop"


def test_the_start_of_a_stop_string_is_passed_on_when_nothing_follows():
    for end in ("limit", "token", "cancel"):
        reply, tokenizer = new_reply(["STOPP"], ends=frozenset([2]))
        tokens = tokenizer.encode("and STO")
        if end == "limit":
            reply.max_tokens = len(tokens)
        pieces = push(reply, tokens)
        if end == "token":
            pieces += push(reply, [2])
        if end == "cancel":
            pieces.append(reply.cancel())
        assert "".join(pieces) == reply.text == "and STO"


def test_special_tokens_give_no_text():
    reply, tokenizer = new_reply()
    tokens = tokenizer.encode("a<|im_start|>b")
    assert 1 in tokens
    assert push(reply, tokens) == ["a", "", "b"]


def test_log_probabilities_are_kept_when_asked_for():
    generator, _, sequences = make()
    config = GenerationConfig(temperature=0.0, logprobs=True, top_logprobs=2)
    (reply,), _ = generator.generate(sequences.add(), PROMPT, config, NEVER, (), 4)
    assert [sampled.token for sampled in reply.logprobs] == reply.tokens
    assert all(len(sampled.top) == 2 for sampled in reply.logprobs)


def test_logits_that_are_no_numbers_end_the_generation(monkeypatch):
    generator, executor, sequences = make()
    forward = executor.forward

    def broken(tables, ids, rows):
        logits = forward(tables, ids, rows)
        if len(executor.steps) == 4:
            logits[1] = np.nan
        return logits

    monkeypatch.setattr(executor, "forward", broken)
    seq, pushed = sequences.add(), []
    config = GenerationConfig(seed=1, n=2)
    with pytest.raises(LibraryError, match="the model computed nan for token 0 in row 1"):
        generator.generate(
            seq, PROMPT, config, NEVER, (), 9, on_text=lambda reply, text: pushed.append(reply)
        )
    assert len(pushed) == 4 and len(sequences) == 1
    sequences.check()
