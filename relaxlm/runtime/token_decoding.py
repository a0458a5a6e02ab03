"""From token ids back to text, one token at a time.

A tokenizer.json names a chain of decoders. Those of language models are of two kinds:

    byte level     every token is a string over 256 letters, each of which stands for one byte
    byte fallback  a token is text with "▁" for a space, or "<0xE4>", one byte of a character
                   that the vocabulary lacks; the text's first space may be an artefact and is
                   then dropped

Both make a stream of bytes and texts that needs no look back: a StreamDecoder keeps at most the
three bytes of an unfinished UTF-8 character. One decode of all ids is a stream with one push, so
any way of cutting the ids gives the same text.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any

from relaxlm.errors import TokenizerError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def byte_letters() -> dict[str, int]:
    """The letter of each byte: itself if printable in Latin-1, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    letters |= {chr(0x100 + i): byte for i, byte in enumerate(others)}
    return letters


_LETTERS = byte_letters()


def _replace_every_byte(error: UnicodeError) -> tuple[str, int]:
    # SentencePiece: one replacement character per byte that is part of no character.
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("relaxlm.every_byte", _replace_every_byte)


@dataclass(frozen=True)
class DecodeRules:
    """What a tokenizer.json's decoder chain comes to.

    `replacements` are made in every token. `strip` leading spaces of the whole text are dropped.
    `drop_in_first` is a letter that is left out of the first token (Metaspace).
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strip: int = 0
    drop_in_first: str = ""

    def piece(self, token: str) -> bytes | str:
        """A token's contribution: bytes, which may be part of a character, or finished text."""
        if self.byte_level:
            # Added tokens are written as themselves; they rarely consist of the 256 letters only.
            if all(letter in _LETTERS for letter in token):
                return bytes(_LETTERS[letter] for letter in token)
            return token.encode("utf-8", "replace")
        if self.byte_fallback and _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token


def decode_rules(decoder: dict[str, Any] | None) -> DecodeRules | None:
    """The rules of the `decoder` of a tokenizer.json, or None where it is not one of the two kinds.

    Source: huggingface/tokenizers, `tokenizers/src/decoders/` and
    `pre_tokenizers/{byte_level,metaspace}.rs`.
    """
    if not isinstance(decoder, dict):
        return None
    chain = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    if not isinstance(chain, list) or not chain:
        return None
    if [link.get("type") for link in chain] == ["ByteLevel"]:
        return DecodeRules(byte_level=True)

    fallback, fused, strip, drop = False, False, 0, ""
    replacements: list[tuple[str, str]] = []
    for link in chain:
        kind = link.get("type")
        if kind == "Replace" and not fused and isinstance(link["pattern"].get("String"), str):
            replacements.append((link["pattern"]["String"], link["content"]))
        elif kind == "ByteFallback" and not fallback and not fused:
            fallback = True
        elif kind == "Metaspace" and not fused:
            # Old files have `add_prefix_space` in place of `prepend_scheme`.
            scheme = link.get("prepend_scheme", "always")
            if scheme != "never" and link.get("add_prefix_space", True):
                drop = link["replacement"]
            replacements.append((link["replacement"], " "))
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and link.get("content") == " " and link.get("stop") == 0:
            strip += link["start"]
        else:
            return None
    return DecodeRules(False, fallback, tuple(replacements), strip, drop)


class StreamDecoder:
    """Turns token ids into text as they arrive; what it returns is final.

    `push` gives all text that no later token can change. An unfinished UTF-8 character is held
    back, at most three bytes. Bytes that belong to no character become U+FFFD: one per maximal
    prefix of a character in byte-level vocabularies (as `tokenizers` does), one per byte
    otherwise (as SentencePiece does). Ids outside the vocabulary give no text.
    """

    def __init__(
        self,
        rules: DecodeRules,
        token: Callable[[int], str | None],
        skip: Set[int] = frozenset(),
        continuing: bool = False,
    ) -> None:
        """
        Args:
            token: the string of an id in the vocabulary, or None.
            skip: ids that give no text, usually the special ones.
            continuing: the ids continue a text, so that their leading space is a space of the text.
        """
        self._rules = rules
        self._token = token
        self._skip = skip
        self._strip = 0 if continuing else rules.strip
        self._drop = "" if continuing else rules.drop_in_first
        errors = "replace" if rules.byte_level else "relaxlm.every_byte"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors=errors)

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids make final, possibly empty."""
        parts = []
        for token_id in ids:
            if token_id in self._skip:
                continue
            token = self._token(token_id)
            if token is None:
                continue
            if self._drop:
                token, self._drop = token.replace(self._drop, ""), ""
            piece = self._rules.piece(token)
            if isinstance(piece, bytes):
                parts.append(self._utf8.decode(piece))
            else:
                parts.append(self._flush() + piece)
        return self._stripped("".join(parts))

    def finish(self) -> str:
        """The rest: what is left of an unfinished character, as U+FFFD. Starts anew for no more
        ids.
        """
        return self._stripped(self._flush())

    def _flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    def _stripped(self, text: str) -> str:
        if not text or not self._strip:
            return text
        kept = text.lstrip(" ")
        dropped = min(self._strip, len(text) - len(kept))
        self._strip = 0 if kept else self._strip - dropped
        return text[dropped:]


def unsupported_decoder(where: str, decoder: dict[str, Any] | None) -> TokenizerError:
    name = "none" if decoder is None else str(decoder.get("type"))
    if isinstance(decoder, dict) and name == "Sequence":
        name = " + ".join(str(link.get("type")) for link in decoder.get("decoders", []))
    return TokenizerError(
        f"{where}: decoder {name} cannot be streamed: supported are ByteLevel, Metaspace, and "
        f"chains of "
        "Replace, ByteFallback, Fuse and Strip"
    )
