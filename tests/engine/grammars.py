"""Vocabularies for the tests of grammars, and walks through a grammar."""

import json
import random
from functools import cache

import numpy as np
import tokenizers

from relaxlm.engine.grammar import Grammar, GrammarCompiler, GrammarSpec, Matcher
from relaxlm.errors import RequestError
from relaxlm.runtime.tokenizer import Tokenizer
from tests.tiny_model import VOCAB, tokenizer_json

SETTINGS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
# Tokens that bring a JSON text to its end.
_CLOSING = set(b'"]}:,0123456789ntfesrul ')


@cache
def byte_level() -> Tokenizer:
    """300 tokens: all single bytes, some words, three special ones."""
    return Tokenizer(tokenizer_json().encode(), SETTINGS)


@cache
def byte_fallback() -> Tokenizer:
    """A SentencePiece-like vocabulary; 32 and 98 are the bytes of letters that have a token too."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "a", "b", "▁a", "ab", '"', '{"', '":', "é", "▁▁"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "a"), ("a", "b"), ("▁", "▁")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(tokenizer.to_str().encode(), {"eos_token": "</s>", "bos_token": "<s>"})


@cache
def compiler() -> GrammarCompiler:
    """Over the byte-level vocabulary, padded as a model's is."""
    return GrammarCompiler(byte_level(), VOCAB, stops(byte_level()))


def stops(tokenizer: Tokenizer) -> list[int]:
    found = [tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>", "</s>")]
    return [token for token in found if token is not None]


def compiled(kind: str, source: object = "", trusted: bool = False) -> Grammar:
    text = source if isinstance(source, str) else json.dumps(source)
    return compiler().compile(GrammarSpec(kind, text, trusted))  # type: ignore[arg-type]


def allowed(matcher: Matcher) -> set[int]:
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
    return {int(token) for token in np.nonzero(bits)[0]}


def follow(matcher: Matcher, text: str | bytes) -> bool:
    """Whether the grammar takes a text, byte by byte."""
    content = text.encode() if isinstance(text, str) else text
    letters = {byte_level().token_bytes(token): token for token in range(3, 259)}
    try:
        for byte in content:
            matcher.accept(letters[bytes([byte])])
    except RequestError:
        return False
    return True


def complete(matcher: Matcher) -> bool:
    return stops(byte_level())[0] in allowed(matcher)


def matches(grammar: Grammar, text: str) -> bool:
    matcher = grammar.matcher()
    return follow(matcher, text) and complete(matcher)


def walk(
    grammar: Grammar, tokenizer: Tokenizer, rng: random.Random, steps: int = 400
) -> bytes | None:
    """A random text that the grammar allows; None if it has no end within so many tokens."""
    matcher = grammar.matcher()
    ends = set(stops(tokenizer))
    text = b""
    for step in range(steps):
        choices = allowed(matcher)
        if matcher.ended:
            assert choices == ends
        if choices & ends and (choices == ends or rng.random() < 0.3):
            assert ends <= choices
            return text
        tokens = sorted(choices - ends)
        closing = [token for token in tokens if set(tokenizer.token_bytes(token)) <= _CLOSING]
        if closing and rng.random() < (0.5 if step < steps // 2 else 0.95):
            tokens = closing
        token = rng.choice(tokens)
        matcher.accept(token)
        text += tokenizer.token_bytes(token)
    return None
