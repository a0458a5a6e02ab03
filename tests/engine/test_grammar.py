import json
import random
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relaxlm.engine.grammar import GrammarCompiler, GrammarSpec
from relaxlm.errors import RequestError
from relaxlm.runtime.tokenizer import Tokenizer
from tests.engine.grammars import (
    allowed,
    byte_fallback,
    byte_level,
    compiled,
    compiler,
    complete,
    follow,
    matches,
    stops,
    walk,
)
from tests.shared_data import SHARED, needs_shared_data
from tests.tiny_model import TOKENS, VOCAB

STOPS = set(stops(byte_level()))
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "tags": {"type": "array", "items": {"enum": ["the", "日本"]}, "maxItems": 2},
    },
    "required": ["name"],
    "additionalProperties": False,
}
GRAMMARS = [
    ("json_schema", json.dumps(SCHEMA)),
    ("json_object", ""),
    ("regex", "(the (cat|dog)|größer 🙂?|[^a-z]{2})+"),
    ("choice", '["the cat", "the", "日本語", ""]'),
    ("lark", 'start: <|im_start|>? T <|im_start|> %json {"type": "integer"} <[7-9]>\nT: /[a-c]*/'),
]


@pytest.mark.parametrize(("kind", "source"), GRAMMARS, ids=[kind for kind, _ in GRAMMARS])
@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback])
def test_a_mask_has_what_a_fork_accepts(kind, source, tokenizer) -> None:
    """Every token of the vocabulary, and those that only the model has, along random texts."""
    tokenizer = tokenizer()
    source = source.replace(
        "<|im_start|>", "<s>" if tokenizer is byte_fallback() else "<|im_start|>"
    )
    size = tokenizer.vocab_size + 20
    grammar = GrammarCompiler(tokenizer, size, stops(tokenizer)).compile(GrammarSpec(kind, source))
    rng = random.Random(7)
    for _ in range(3):
        matcher = grammar.matcher()
        for _ in range(8):
            choices = allowed(matcher)
            for token in range(size):
                fork = matcher.fork()
                if token in choices:
                    fork.accept(token)
                else:
                    with pytest.raises(RequestError, match=f"token {token} does not fit"):
                        fork.accept(token)
            assert allowed(matcher) == choices
            if matcher.ended:
                break
            matcher.accept(rng.choice(sorted(choices - set(stops(tokenizer)))))


def test_a_mask_is_a_bit_for_each_row_of_the_model() -> None:
    for size in (TOKENS, TOKENS + 1, 320, 321):
        mask = (
            GrammarCompiler(byte_level(), size, STOPS)
            .compile(GrammarSpec("regex", ".*"))
            .matcher()
            .mask()
        )
        assert mask.dtype == np.uint32 and mask.shape == (-(-size // 32),)
    small = GrammarCompiler(byte_level(), 100, STOPS).compile(GrammarSpec("regex", ".*")).matcher()
    assert max(allowed(small)) < 100  # fewer rows than the tokenizer has tokens


def test_special_and_stop_tokens_are_never_text() -> None:
    choices = allowed(compiled("regex", r"(?s:.*)").matcher())
    assert choices & set(byte_level().special_ids) == STOPS
    assert not choices & set(range(TOKENS, VOCAB))
    # A stop token that is a word is none either.
    word = byte_level().token_to_id("Ġthe")
    grammar = GrammarCompiler(byte_level(), VOCAB, [word]).compile(
        GrammarSpec("choice", '[" the"]')
    )
    matcher = grammar.matcher()
    assert word not in allowed(matcher)
    assert follow(matcher, " the")
    assert allowed(matcher) == {word}


def test_stop_tokens_come_exactly_where_the_text_is_complete() -> None:
    matcher = compiled("regex", "ab(cd)?").matcher()
    seen = []
    for letter in "abcd":
        seen.append(complete(matcher))
        assert follow(matcher, letter)
        assert matcher.ended == (letter == "d")
    assert seen == [False, False, True, False]
    assert allowed(matcher) == STOPS
    for stop in sorted(STOPS) * 2:
        matcher.accept(stop)
        assert matcher.ended and allowed(matcher) == STOPS
    with pytest.raises(RequestError):
        matcher.accept(50)


def test_a_grammar_of_the_empty_text_leaves_only_the_end() -> None:
    for grammar in (compiled("regex", ""), compiled("choice", [""]), compiled("lark", 'start: ""')):
        matcher = grammar.matcher()
        assert allowed(matcher) == STOPS
        matcher.accept(min(STOPS))
        assert matcher.ended


def test_a_refused_token_changes_nothing() -> None:
    matcher = compiled("regex", "ab").matcher()
    for token in (-1, 70, VOCAB - 1, VOCAB, 10**12, *STOPS):
        with pytest.raises(RequestError, match=f"token {token} does not fit the grammar here"):
            matcher.accept(token)
    assert follow(matcher, "ab") and matcher.ended


def test_a_fork_goes_its_own_way() -> None:
    matcher = compiled("choice", ["cat", "car", "cow"]).matcher()
    assert follow(matcher, "c")
    fork = matcher.fork()
    assert follow(fork, "ow") and fork.ended
    assert not matcher.ended and follow(matcher, "a")
    assert not follow(matcher.fork(), "w") and follow(matcher.fork(), "r") and follow(matcher, "t")


def test_forced_tokens_are_those_of_the_only_text() -> None:
    """The text in front of a choice, without the token that may be cut in one with what follows."""
    matcher = compiled("regex", "the cat sat on the (mat|dog)").matcher()
    forced = matcher.forced()
    assert forced == byte_level().encode("the cat sat on the ", False)[:-1]
    assert len(forced) < len("the cat sat on the")
    for token in forced:
        assert token in allowed(matcher)
        matcher.accept(token)
    assert not matcher.forced() and len(allowed(matcher)) > 1
    assert follow(matcher, " m")
    assert matcher.forced() == byte_level().encode("at", False)
    assert not complete(matcher)  # asking has changed nothing
    assert follow(matcher, "at") and matcher.ended and not matcher.forced()


def test_forced_text_ends_with_a_whole_character() -> None:
    matcher = compiled("choice", ["é🙂", "é🙃"]).matcher()  # these two differ in the last byte
    forced = matcher.forced()
    assert forced == byte_level().encode("é", False)[:-1] and forced
    assert follow(matcher, "é🙂".encode()[:3]) and matcher.forced() == []


def test_text_that_the_tokenizer_cuts_into_other_bytes_is_not_forced() -> None:
    """A name of a special token is its id to the tokenizer, and text to a grammar."""
    matcher = compiled("choice", ["a<|im_end|>b"]).matcher()
    forced = matcher.forced()
    assert not STOPS & set(forced)
    for token in forced:
        matcher.accept(token)
    sentence_piece = GrammarCompiler(byte_fallback(), 300, stops(byte_fallback()))
    matcher = sentence_piece.compile(GrammarSpec("choice", '["日ab"]')).matcher()
    assert matcher.forced() == byte_fallback().encode("日ab", False)


def test_characters_may_be_cut_over_tokens() -> None:
    matcher = compiled("choice", ["🙂", "é"]).matcher()
    assert follow(matcher, "🙂".encode()[:3])
    assert [byte_level().token_bytes(token) for token in allowed(matcher)] == ["🙂".encode()[3:]]
    assert not follow(compiled("regex", ".").matcher(), b"\xff")
    assert not follow(compiled("regex", r"(?s:.*)").matcher(), b"\xc0\xaf")


@pytest.mark.parametrize(
    ("pattern", "alphabet"),
    [
        (r"[a-c]+\d{2,3}", "abc019é"),
        (r"(ab|a)*b?", "abc"),
        (r"^x[^\n]y$", "xy\n/"),
        (r"^a|b$", "ab"),
        (r"a/b\/c|\$\\", "abc/$\\"),
        (r"(?i)größe|\w\s\W", "gröGRÖßesS! \t"),
        (r'"(\\.|[^"\\])*"', 'ab"\\'),
        (r"", "ab"),
    ],
)
def test_a_regex_matches_what_python_matches(pattern: str, alphabet: str) -> None:
    grammar = compiled("regex", pattern)
    rng = random.Random(3)
    texts = {
        walked.decode()
        for _ in range(20)
        if (walked := walk(grammar, byte_level(), rng, 60)) is not None
    }
    assert texts
    assert all(re.fullmatch(pattern, text) for text in texts)
    texts |= {"".join(rng.choices(alphabet, k=rng.randrange(5))) for _ in range(40)}
    for text in texts:
        assert matches(grammar, text) == bool(re.fullmatch(pattern, text)), text


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=6), min_size=1, max_size=6), st.text(max_size=6))
def test_a_choice_is_one_of_its_texts(texts: list[str], other: str) -> None:
    grammar = compiled("choice", texts)
    for text in {*texts, other, texts[0] + other, texts[0][:-1]}:
        assert matches(grammar, text) == (text in texts)


def test_lark_with_special_tokens_and_json() -> None:
    """A call between special tokens, as models write it, or free text."""
    begin = byte_level().token_to_id("<|im_start|>")
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    source = f"""
        start: TEXT | call+            // either
        call: <|im_start|> "cat " args <[{begin}]>
        args: %json {json.dumps(schema, indent=1)}
        TEXT: /(.|\\n)*/
    """.replace("\n        ", "\n")
    grammar = compiled("lark", source)
    assert matches(grammar, "any text <|im_start|> spelled out")
    for tail in (False, True):
        matcher = grammar.matcher()
        for _ in range(1 + tail):
            assert begin in allowed(matcher)
            matcher.accept(begin)
            assert not complete(matcher)
            assert follow(matcher, 'cat {"x": 5}')
            assert allowed(matcher) == {begin}
            matcher.accept(begin)
            assert complete(matcher)
    assert not follow(matcher, "dog")


def test_embedded_schemas_are_checked_and_laid_out_as_others() -> None:
    with pytest.raises(RequestError, match="#/items: uniqueItems: not supported"):
        compiled("lark", 'start: %json {"items": {"uniqueItems": true}}')
    grammar = compiled("lark", 'start: "x" %json {"items": {"type": "integer"}, "type": "array"}')
    assert matches(grammar, "x[1, 2]") and not matches(grammar, "x[1,  2]")


def test_every_request_compiles_a_grammar_of_its_own() -> None:
    spec = GrammarSpec("regex", "a+")
    first, second = compiler().compile(spec), compiler().compile(spec)
    assert first is not second
    assert matches(first, "aa") and matches(second, "a")


def test_grammars_are_compiled_and_followed_by_many_threads() -> None:
    fresh = GrammarCompiler(byte_level(), VOCAB, STOPS)
    failures: list[object] = []

    def work(i: int) -> None:
        try:
            for _ in range(5):
                assert matches(fresh.compile(GrammarSpec("regex", f"a{{{i}}}b*")), "a" * i + "bb")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_without_llguidance_the_message_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'relaxlm\[serve\]'"):
        GrammarCompiler(byte_level(), VOCAB, STOPS).compile(GrammarSpec("json_object"))


def test_a_model_without_a_stop_token() -> None:
    with pytest.raises(RequestError, match="needs a model with a stop token"):
        GrammarCompiler(byte_level(), VOCAB, []).compile(GrammarSpec("json_object"))


@needs_shared_data
@pytest.mark.parametrize("name", ["phi-3", "gpt2"])
def test_walks_over_real_vocabularies(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(SHARED / "tokenizers" / name)
    end = "<|endoftext|>"
    stop = tokenizer.token_to_id(end)
    assert stop is not None
    grammars = GrammarCompiler(tokenizer, tokenizer.vocab_size + 7, [stop])
    grammar = grammars.compile(GrammarSpec("json_schema", json.dumps(SCHEMA)))
    text = '{"name": "größe", "tags": ["日本", "the"]}'
    matcher = grammar.matcher()
    ids = tokenizer.encode(text, add_special_tokens=False)
    skipped = 0
    while tokenizer.token_bytes(ids[skipped]).isspace():
        skipped += 1  # SentencePiece begins a text with a space
    if not tokenizer.token_bytes(ids[skipped]).startswith(b" "):
        for token in ids[skipped:]:
            assert token in allowed(matcher)
            matcher.accept(token)
        assert allowed(matcher) == {stop}
    for token in grammar.matcher().forced():
        assert token in allowed(grammar.matcher())
    rng = random.Random(1)
    for _ in range(5):
        matcher, pieces = grammar.matcher(), []
        while not matcher.ended and len(pieces) < 200:
            token = rng.choice(sorted(allowed(matcher)))
            matcher.accept(token)
            pieces.append(tokenizer.token_bytes(token))
        assert set(json.loads(b"".join(pieces))) <= {"name", "tags"}
