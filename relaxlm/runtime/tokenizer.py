"""Text to token ids and back, over the `tokenizers` library and a model folder's tokenizer.json.

tokenizer.json says how text is cut; tokenizer_config.json and special_tokens_map.json say which
tokens are special and whether a text starts with the one that begins a sequence (BOS). `load`
reads all three as transformers does.
"""

import ctypes
import sys
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import tokenizers
from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json

from relaxlm.errors import RequestError, TokenizerError
from relaxlm.files import parse_json_object, read_bytes, read_json_object
from relaxlm.runtime.token_decoding import (
    DecodeRules,
    StreamDecoder,
    decode_rules,
    unsupported_decoder,
)

__all__ = ["StreamDecoder", "Tokenizer", "TokenizerInfo", "special_token_names"]

# The tokens that tokenizer_config.json gives by role and that chat templates may name.
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def _return_freed_memory() -> None:
    """Give what parsing took, 60 MB for a vocabulary of 150 000, back to the system.

    glibc keeps it otherwise, and a process that then maps weights never fills it again.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _parse(content: bytes, where: str) -> dict[str, Any]:
    """tokenizer.json, megabytes in most models, by pydantic's parser, which is quicker."""
    try:
        description = from_json(content)
    except ValueError:
        description = None
    if isinstance(description, dict):
        return description
    return parse_json_object(content, where, TokenizerError)  # tells what is wrong


def _model_ids(description: dict[str, Any]) -> Iterable[int]:
    """The ids of the model's own tokens: a mapping in most models, a list in Unigram ones."""
    vocab = description.get("model", {}).get("vocab") or {}
    return vocab.values() if isinstance(vocab, dict) else range(len(vocab))


class TokenizerInfo(BaseModel):
    """The `tokenizer_info` of mlc-chat-config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_postproc_method: Literal["byte_fallback", "byte_level"] = "byte_fallback"
    prepend_space_in_encode: bool = False
    strip_space_in_decode: bool = False


class Tokenizer:
    """A model's vocabulary: encodes texts, decodes ids, and knows the special tokens."""

    def __init__(
        self,
        content: bytes,
        settings: dict[str, Any] | None = None,
        where: str = "tokenizer.json",
    ) -> None:
        """
        Args:
            content: the bytes of tokenizer.json.
            settings: the content of tokenizer_config.json, completed by special_tokens_map.json.
            where: the name that errors give.

        Raises:
            TokenizerError: not a tokenizer that the `tokenizers` library reads, an added token that
                is there twice, or a token whose id differs between the two files.
        """
        settings = settings or {}
        self.where = where
        description = _parse(content, where)
        check_added_tokens(description, where)
        try:
            self._backend = tokenizers.Tokenizer.from_buffer(content)
        except Exception as reason:  # the library raises plain Exception
            raise TokenizerError(f"{where}: not a tokenizer.json: {reason}") from reason
        for token in description.get("added_tokens") or []:
            found = self._backend.token_to_id(token["content"])
            if found != token["id"]:
                raise TokenizerError(
                    f"{where}: added token {token['content']!r} has id {token['id']}, but the "
                    f"tokenizers library gives it {found}, because the ids before it have gaps. "
                    "Get a corrected file."
                )
        # Limits that a file may carry over from training would cut prompts silently.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.special_tokens = special_token_names(settings)
        self._add_declared_tokens(settings)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._description = {
            key: description.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")
        }
        self._highest_id = max([-1, *added, *_model_ids(description)])
        self._rules = decode_rules(self._description["decoder"])
        self._prefix, self._suffix = self._sequence_frame(settings)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a model folder.

        Raises:
            TokenizerError: tokenizer.json is missing, a Git LFS pointer, or not readable as a
                tokenizer.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(_missing(folder))
        tokenizer = cls(read_bytes(path, TokenizerError), load_settings(folder), str(path))
        _return_freed_memory()
        return tokenizer

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """One more than the highest id: logits from there on are padding."""
        return self._highest_id + 1

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it ("Ġworld", "▁world"); None outside the
        vocabulary.
        """
        if token_id < 0:
            return None
        return self._backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of text that a token stands for, its leading space included; b"" outside the
        vocabulary.

        Raises:
            TokenizerError: as for `stream`.
        """
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        piece = self._decode_rules().piece(token)
        return piece if isinstance(piece, bytes) else piece.encode("utf-8")

    def _role_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.token_to_id(token)

    @property
    def bos_id(self) -> int | None:
        """The id of the token that begins a sequence, whether or not `encode` adds it."""
        return self._role_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._role_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        return self._role_id("pad_token")

    @property
    def adds_bos(self) -> bool:
        """Whether `encode` puts the BOS token in front of a text."""
        return self.bos_id is not None and self.bos_id in self._prefix

    # Text to ids

    def encode(
        self, text: str, add_special_tokens: bool = True, longest: int | None = None
    ) -> list[int]:
        """Token ids of a text.

        Special tokens that the text spells out become their ids. `add_special_tokens` adds what the
        model expects around a text, such as BOS. The text's last tokens are cut off where there
        would be more than `longest` in all.

        Raises:
            RequestError: half of a surrogate pair in the text, which no UTF-8 text has.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has {text[error.start]!a} at position {error.start}, half of a "
                "surrogate pair and no character: send valid Unicode"
            ) from None
        ids = self._backend.encode(text, add_special_tokens=False).ids
        prefix, suffix = (self._prefix, self._suffix) if add_special_tokens else ((), ())
        if longest is not None:
            del ids[max(0, longest - len(prefix) - len(suffix)) :]
        return [*prefix, *ids, *suffix]

    def _sequence_frame(self, settings: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that encode adds in front of a text and behind it.

        The post-processor of tokenizer.json gives them. Where tokenizer_config.json has
        `add_bos_token`, it decides whether the BOS token is one of them, and `add_eos_token`
        decides about the EOS token; other tokens stay, such as the one that Qwen3-Embedding pools.
        """
        plain = self._backend.encode("a", add_special_tokens=False).ids
        framed = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(framed) - len(plain) + 1):
            if framed[start : start + len(plain)] == plain:
                break
        else:
            raise TokenizerError(
                f"{self.where}: its post_processor changes the ids of a text instead of adding to "
                "them"
            )
        prefix, suffix = framed[:start], framed[start + len(plain) :]
        bos, eos = self.bos_id, self.eos_id
        if "add_bos_token" in settings and bos is not None:
            kept = [token for token in prefix if token != bos]
            prefix = [bos, *kept] if settings["add_bos_token"] else kept
        if "add_eos_token" in settings and eos is not None:
            kept = [token for token in suffix if token != eos]
            suffix = [*kept, eos] if settings["add_eos_token"] else kept
        return tuple(prefix), tuple(suffix)

    # Ids to text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; unfinished characters become U+FFFD. The same as streaming them.

        Spaces in front of punctuation stay: `clean_up_tokenization_spaces` is not applied.
        """
        if self._rules is None:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        decoder = self.stream(skip_special_tokens)
        return decoder.push(ids) + decoder.finish()

    def stream(
        self,
        skip_special_tokens: bool = True,
        continuing: bool = False,
        shown: Set[int] = frozenset(),
    ) -> StreamDecoder:
        """A decoder for ids that arrive one by one.

        Args:
            shown: special tokens that are not skipped.
            continuing: the ids continue a text; otherwise they start one, and the leading space
                that SentencePiece vocabularies put in front of a text is dropped.

        Raises:
            TokenizerError: a decoder that rewrites earlier text (WordPiece and the like).
        """
        skip = self.special_ids - shown if skip_special_tokens else frozenset()
        return StreamDecoder(self._decode_rules(), self.id_to_token, skip, continuing)

    def _decode_rules(self) -> DecodeRules:
        if self._rules is None:
            raise unsupported_decoder(self.where, self._description["decoder"])
        return self._rules

    # Facts for mlc-chat-config.json

    @property
    def info(self) -> TokenizerInfo:
        """How tokens stand for bytes and spaces, found as MLC's tools find it."""
        decoders = _chain(self._description["decoder"], "decoders")
        normalizers = _chain(self._description["normalizer"], "normalizers")
        byte_level = any(link.get("type") == "ByteLevel" for link in decoders)
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        return TokenizerInfo(
            token_postproc_method="byte_level" if byte_level else "byte_fallback",
            prepend_space_in_encode={"type": "Prepend", "prepend": "▁"} in normalizers,
            strip_space_in_decode=strip in decoders,
        )

    # Loading

    def _add_declared_tokens(self, settings: dict[str, Any]) -> None:
        """Add the tokens that only tokenizer_config.json has, as transformers does on loading."""
        present = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        declared = settings.get("added_tokens_decoder") or {}
        for token_id, entry in sorted(declared.items(), key=lambda item: int(item[0])):
            content = entry["content"]
            if content in present:
                found = self.token_to_id(content)
            else:
                flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
                given = {flag: bool(entry[flag]) for flag in flags if flag in entry}
                self._backend.add_tokens([tokenizers.AddedToken(content, **given)])
                found = self.token_to_id(content)
            if found != int(token_id):
                raise TokenizerError(
                    f"{self.where}: token {content!r} has id {found}, but {token_id} in "
                    "tokenizer_config.json. Are the two files from the same revision?"
                )
            present.add(content)
        # A token with a role is special; one that is nowhere yet gets the next id.
        extra = settings.get("additional_special_tokens") or []
        named = [entry["content"] if isinstance(entry, dict) else entry for entry in extra]
        for token_name in dict.fromkeys([*self.special_tokens.values(), *named]):
            if token_name not in present:
                self._backend.add_special_tokens([token_name])


def load_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the special tokens that only special_tokens_map.json has.

    Raises:
        TokenizerError: a file is there but is no JSON object.
    """
    settings: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = read_json_object(folder / "tokenizer_config.json", TokenizerError)
    if (folder / "special_tokens_map.json").is_file():
        names = read_json_object(folder / "special_tokens_map.json", TokenizerError)
        settings = names | {key: value for key, value in settings.items() if value is not None}
    return settings


def special_token_names(settings: dict[str, Any]) -> dict[str, str]:
    """Role ("bos_token") -> token; files give a string or an AddedToken object."""
    names = {}
    for role in _ROLES:
        value = settings.get(role)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str) and value:
            names[role] = value
    return names


def check_added_tokens(description: dict[str, Any], where: str) -> None:
    """Refuse a tokenizer.json that lists an added token twice: the library would use either id.

    Raises:
        TokenizerError: names the token or the id.
    """
    added = description.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and "id" in token
        for token in added
    ):
        raise TokenizerError(f"{where}: added_tokens is not a list of tokens with content and id")
    for key in ("content", "id"):
        for value, count in Counter(token[key] for token in added).items():
            if count > 1:
                raise TokenizerError(
                    f"{where}: {count} added tokens have the {key} {value!r}, which makes encoding "
                    "ambiguous. Remove the duplicates from added_tokens, or get a corrected file."
                )


def _chain(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or decoder, which may be one step, a Sequence, or none."""
    if not isinstance(step, dict):
        return []
    return step.get(key, []) if step.get("type") == "Sequence" else [step]


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder, so no tokenizer.json in it"
    others: Iterable[str] = ("tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model")
    found = [name for name in others if (folder / name).is_file()]
    if found:
        return (
            f"{folder}: no tokenizer.json, only {' and '.join(found)}. "
            "`relaxlm gen_config` converts it; use the folder that it writes."
        )
    return (
        f"{folder}: no tokenizer.json. Copy it from the Hugging Face folder that the weights "
        f"came from, "
        "or run `relaxlm gen_config` on that folder."
    )
