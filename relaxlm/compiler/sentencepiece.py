"""Converts a SentencePiece model (tokenizer.model) to tokenizer.json, without its package.

A tokenizer.model is one protobuf message. Of its fields these decide what the tokens of a text are:

    1 pieces           repeated: 1 piece (text), 2 score (float), 3 type
    2 trainer_spec     3 model_type (1 unigram, 2 BPE), 24 treat_whitespace_as_suffix,
                       35 byte_fallback, 40 unk_id, 41 bos_id, 42 eos_id, 43 pad_id
    3 normalizer_spec  2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces,
                       5 escape_whitespaces

Source: google/sentencepiece, `src/sentencepiece_model.proto`; the wire format is protobuf's,
version 2.
"""

import base64
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from relaxlm.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says; ids are -1 where there is no such token."""

    pieces: tuple[Piece, ...]
    kind: int
    byte_fallback: bool
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    def token(self, token_id: int) -> str | None:
        """The text of an id, or None for -1."""
        return self.pieces[token_id].text if 0 <= token_id < len(self.pieces) else None


def parse_model(content: bytes, where: str) -> SentencePieceModel:
    """Read the content of a tokenizer.model.

    Raises:
        TokenizerError: not a SentencePiece model, cut off, or of a kind that is not converted.
    """
    try:
        pieces, trainer, normalizer = [], {}, {}
        for number, value in _fields(content):
            if number == 1:
                fields = dict(_fields(_bytes(value)))
                score = struct.unpack("<f", _bytes(fields.get(2, b"\0\0\0\0")))[0]
                pieces.append(
                    Piece(_bytes(fields[1]).decode("utf-8"), score, _int(fields.get(3, NORMAL)))
                )
            elif number == 2:
                trainer = dict(_fields(_bytes(value)))
            elif number == 3:
                normalizer = dict(_fields(_bytes(value)))
        if not pieces or not trainer:
            raise ValueError("it has no pieces")
        model = SentencePieceModel(
            pieces=tuple(pieces),
            kind=_int(trainer.get(3, UNIGRAM)),
            byte_fallback=bool(trainer.get(35, 0)),
            unk_id=_signed(trainer.get(40, 0)),
            bos_id=_signed(trainer.get(41, 1)),
            eos_id=_signed(trainer.get(42, 2)),
            pad_id=_signed(trainer.get(43, -1)),
            charsmap=_bytes(normalizer.get(2, b"")),
            add_dummy_prefix=bool(normalizer.get(3, 1)),
            remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        )
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as reason:
        raise TokenizerError(
            f"{where}: not a SentencePiece model, or cut off: {reason}. Download the file again."
        ) from reason
    if model.kind not in (UNIGRAM, BPE):
        kind = {3: "word", 4: "char"}.get(model.kind, str(model.kind))
        raise TokenizerError(
            f"{where}: SentencePiece model_type {kind} is not converted: expected unigram or bpe"
        )
    for name, bad in (
        ("treat_whitespace_as_suffix = true", bool(trainer.get(24, 0))),
        ("escape_whitespaces = false", not normalizer.get(5, 1)),
        ("pieces of type UNUSED", any(piece.kind == UNUSED for piece in pieces)),
    ):
        if bad:
            raise TokenizerError(f"{where}: a SentencePiece model with {name} is not converted")
    return model


def convert(model: SentencePieceModel, settings: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer.json that cuts texts as the SentencePiece model does.

    Args:
        settings: tokenizer_config.json. Only its flags count: `add_bos_token` (default true),
            `add_eos_token` (default false), and `legacy` (default true): whether the text behind
            a special token gets a leading space too, as in transformers' first converters.
    """
    legacy = settings.get("legacy") is not False
    prepend = settings.get("add_prefix_space", model.add_dummy_prefix) is not False
    first_only = prepend and not legacy
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": piece.text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": piece.kind != USER_DEFINED,
            }
            for token_id, piece in enumerate(model.pieces)
            if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": _normalizer(model, prepend and not first_only),
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
        if first_only
        else None,
        "post_processor": post_processor(
            _role(model, model.bos_id) if settings.get("add_bos_token", True) else None,
            _role(model, model.eos_id) if settings.get("add_eos_token", False) else None,
        ),
        "decoder": _decoder(prepend),
        "model": _bpe(model) if model.kind == BPE else _unigram(model),
    }


def special_tokens(model: SentencePieceModel) -> dict[str, Any]:
    """The special tokens by role and the flags, as a tokenizer_config.json has them."""
    roles = {
        "bos_token": model.bos_id,
        "eos_token": model.eos_id,
        "unk_token": model.unk_id,
        "pad_token": model.pad_id,
    }
    named = {role: model.token(token_id) for role, token_id in roles.items()}
    flags = {"add_bos_token": named["bos_token"] is not None, "add_eos_token": False}
    return {**flags, **{role: token for role, token in named.items() if token is not None}}


def post_processor(
    first: tuple[str, int] | None, last: tuple[str, int] | None = None
) -> dict[str, Any]:
    """The step that puts one special token (text, id) in front of a text and one behind it."""

    def one(type_id: int, name: str) -> list[dict[str, Any]]:
        parts = [first, None, last]
        marks = [
            {"SpecialToken": {"id": part[0], "type_id": type_id}}
            if part
            else {"Sequence": {"id": name, "type_id": type_id}}
            for i, part in enumerate(parts)
            if part or i == 1
        ]
        return marks

    return {
        "type": "TemplateProcessing",
        "single": one(0, "A"),
        "pair": [*one(0, "A"), *one(1, "B")],
        "special_tokens": {
            text: {"id": text, "ids": [token_id], "tokens": [text]}
            for text, token_id in filter(None, (first, last))
        },
    }


def _role(model: SentencePieceModel, token_id: int) -> tuple[str, int] | None:
    text = model.token(token_id)
    return None if text is None else (text, token_id)


def _normalizer(model: SentencePieceModel, prepend: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_whitespaces:
        steps.append(_replace({"Regex": "^ +| +$"}, ""))
        steps.append(_replace({"Regex": " {2,}"}, " "))
    if prepend:
        steps.append({"type": "Prepend", "prepend": "▁"})
    steps.append(_replace({"String": " "}, "▁"))
    return {"type": "Sequence", "normalizers": steps}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _decoder(prepended: bool) -> dict[str, Any]:
    steps = [_replace({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prepended:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _unigram(model: SentencePieceModel) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": model.unk_id,
        "vocab": [[piece.text, piece.score] for piece in model.pieces],
        "byte_fallback": model.byte_fallback,
    }


def _bpe(model: SentencePieceModel) -> dict[str, Any]:
    """The BPE whose merges, best first, are all the ways to cut a piece in two pieces.

    SentencePiece joins the neighbours whose union has the best score, whatever they came from.
    """
    ids = {
        piece.text: token_id
        for token_id, piece in enumerate(model.pieces)
        if piece.kind in (NORMAL, USER_DEFINED)
    }
    merges = []
    for token_id, piece in enumerate(model.pieces):
        if piece.kind != NORMAL:
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in ids and right in ids:
                merges.append((-piece.score, token_id, ids[left], ids[right], left, right))
    merges.sort()
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.token(model.unk_id),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.text: token_id for token_id, piece in enumerate(model.pieces)},
        "merges": [[left, right] for *_, left, right in merges],
    }


# The wire format: a field is a tag (number << 3 | kind) and a value; kind 0 is a varint, 1 eight
# bytes, 2 a length and that many bytes, 5 four bytes.


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise ValueError(f"field number 0 at byte {at}")
        value: int | bytes
        if kind == 0:
            value, at = _varint(content, at)
        elif kind in (1, 2, 5):
            size = 8 if kind == 1 else 4
            if kind == 2:
                size, at = _varint(content, at)
            if at + size > len(content):
                raise ValueError(
                    f"{size} bytes expected at byte {at}, {len(content) - at} are there"
                )
            value, at = content[at : at + size], at + size
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        yield number, value


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {at}")


def _signed(value: int | bytes) -> int:
    number = _int(value)
    return number - (1 << 64) if number >= 1 << 63 else number


def _int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number is expected")
    return value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes are expected")
    return value
