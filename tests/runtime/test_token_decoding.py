import json
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from relaxlm.errors import TokenizerError
from relaxlm.runtime.token_decoding import DecodeRules, StreamDecoder, byte_letters, decode_rules
from relaxlm.runtime.tokenizer import Tokenizer
from tests.runtime.tokenizer_samples import byte_fallback_json, byte_level_json

BYTE_LEVEL = Tokenizer(byte_level_json().encode())
BYTE_FALLBACK = Tokenizer(byte_fallback_json().encode())
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["level", "fallback"])

ids_and_cuts = st.tuples(
    st.lists(st.integers(-1, 310), max_size=40), st.lists(st.integers(1, 6), max_size=40)
)


def streamed(tokenizer: Tokenizer, ids: list[int], sizes: list[int], skip: bool = True) -> str:
    decoder = tokenizer.stream(skip)
    text, at = "", 0
    for size in [*sizes, len(ids) + 1]:
        text += decoder.push(ids[at : at + size])
        at += size
    return text + decoder.finish()


@BOTH
@given(case=ids_and_cuts, skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_split_streams_to_the_text_of_one_decode(tokenizer, case, skip) -> None:
    ids, sizes = case
    assert streamed(tokenizer, ids, sizes, skip) == tokenizer.decode(ids, skip)


@given(ids=st.lists(st.integers(0, 310), max_size=40), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_byte_level_text_is_that_of_the_tokenizers_library(ids, skip) -> None:
    reference = tokenizers.Tokenizer.from_str(byte_level_json())
    assert BYTE_LEVEL.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(st.integers(0, 310), max_size=12), skip=st.booleans(), text=st.text(max_size=9))
@settings(max_examples=500, deadline=None)
def test_byte_fallback_text_is_that_of_the_tokenizers_library(ids, skip, text) -> None:
    # Where a run of bytes is broken, the library gives up the whole run; we keep its characters.
    ids = [*ids, *BYTE_FALLBACK.encode(text)]
    ours = BYTE_FALLBACK.decode(ids, skip)
    reference = tokenizers.Tokenizer.from_str(byte_fallback_json())
    if "\ufffd" not in ours:
        assert ours == reference.decode(ids, skip_special_tokens=skip)


@BOTH
@given(text=st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_a_character_comes_with_its_last_byte_and_never_in_part(tokenizer, text) -> None:
    text = text.replace("▁", " ").replace("\ufffd", "?")
    decoder = tokenizer.stream(skip_special_tokens=False)
    seen = ""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        seen += decoder.push([token_id])
        assert "\ufffd" not in seen
        assert text.startswith(seen)
    assert seen == text
    assert decoder.finish() == ""


def test_every_byte_of_a_broken_character_becomes_a_replacement_character() -> None:
    byte = {value: BYTE_FALLBACK.token_to_id(f"<0x{value:02X}>") for value in range(256)}
    the = BYTE_FALLBACK.token_to_id("▁the")
    decoder = BYTE_FALLBACK.stream()
    assert decoder.push([the, byte[0xF0], byte[0x9F], byte[0x98]]) == "the"
    assert decoder.push([the]) == "\ufffd\ufffd\ufffd the"
    assert decoder.push([byte[0xE4], byte[0xBD], byte[0x41]]) == "\ufffd\ufffdA"
    assert decoder.push([byte[0xC3]]) == ""
    assert decoder.finish() == "\ufffd"


def test_special_tokens_inside_a_character_do_not_break_it() -> None:
    first, second = (BYTE_FALLBACK.token_to_id(name) for name in ("<0xC3>", "<0xA9>"))
    assert BYTE_FALLBACK.decode([first, 1, second]) == "é"
    assert BYTE_FALLBACK.decode([first, 1, second], skip_special_tokens=False) == "\ufffd<s>\ufffd"


def test_only_the_first_space_of_a_text_is_dropped() -> None:
    the, spaces = BYTE_FALLBACK.token_to_id("▁the"), BYTE_FALLBACK.token_to_id("▁▁")
    assert BYTE_FALLBACK.decode([the, the]) == "the the"
    assert BYTE_FALLBACK.decode([spaces, the]) == "  the"
    decoder = BYTE_FALLBACK.stream(continuing=True)
    assert decoder.push([the]) == " the"


def test_the_decoder_keeps_no_history() -> None:
    decoder = BYTE_LEVEL.stream()
    ids = BYTE_LEVEL.encode("again and again " * 200)
    for token_id in ids:
        decoder.push([token_id])
        pending, _ = decoder._utf8.getstate()
        assert len(pending) <= 3


DECODERS = {
    "metaspace": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
    "metaspace never": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"},
    "fallback metaspace": {
        "type": "Sequence",
        "decoders": [
            {"type": "ByteFallback"},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"},
        ],
    },
    "no strip": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    },
}


@pytest.mark.parametrize("name", DECODERS)
def test_other_decoder_chains_are_those_of_the_tokenizers_library(name) -> None:
    content = json.loads(byte_fallback_json()) | {"decoder": DECODERS[name]}
    ours = Tokenizer(json.dumps(content).encode())
    reference = tokenizers.Tokenizer.from_str(json.dumps(content))
    generator = random.Random(5)
    for _ in range(300):
        ids = [generator.randrange(259, ours.vocab_size) for _ in range(generator.randrange(8))]
        if name != "metaspace" and name != "metaspace never":
            ids += ours.encode("é😀 the", add_special_tokens=False)
        assert ours.decode(ids) == reference.decode(ids)


def test_a_decoder_that_rewrites_earlier_text_is_not_streamed() -> None:
    content = json.loads(byte_fallback_json()) | {
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}
    }
    tokenizer = Tokenizer(json.dumps(content).encode(), where="bert/tokenizer.json")
    assert tokenizer.decode([260, 261]) == "t h"
    with pytest.raises(TokenizerError) as caught:
        tokenizer.stream()
    assert str(caught.value) == (
        "bert/tokenizer.json: decoder WordPiece cannot be streamed: supported are ByteLevel, "
        "Metaspace, and chains of Replace, ByteFallback, Fuse and Strip"
    )


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "Sequence", "decoders": []},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
    ],
)
def test_chains_of_other_kinds_have_no_rules(decoder) -> None:
    assert decode_rules(decoder) is None


def test_the_letters_of_bytes_are_those_of_the_tokenizers_library() -> None:
    assert set(byte_letters()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_letters().values()) == list(range(256))


def test_a_decoder_without_a_vocabulary() -> None:
    decoder = StreamDecoder(DecodeRules(byte_level=True), {0: "Ã", 1: "©", 2: "你"}.get)
    assert [decoder.push([i]) for i in (0, 1, 5, 2)] == ["", "é", "", "你"]
