"""A model's vocabulary as llguidance takes it."""

from __future__ import annotations

import codecs
import threading
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from relaxlm.errors import RequestError

if TYPE_CHECKING:
    from relaxlm.runtime.tokenizer import Tokenizer


def load_llguidance() -> Any:
    """The library, loaded when a request first needs it.

    Raises:
        RequestError: it is not installed.
    """
    try:
        import llguidance
    except ImportError as reason:
        raise RequestError(
            "structured output needs llguidance, which is not installed: "
            "pip install 'relaxlm[serve]'"
        ) from reason
    return llguidance


class GrammarVocabulary:
    """The bytes of every token, and which tokens are no text. Thread-safe."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, stop_token_ids: Collection[int]
    ) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self.stops = frozenset(token for token in stop_token_ids if 0 <= token < vocab_size)
        self._lock = threading.Lock()
        self._table: Any = None
        self._usable = bytearray(vocab_size)

    def has(self, token: int) -> bool:
        """Whether a token stands for anything."""
        return 0 <= token < self.vocab_size and bool(self._usable[token])

    def cut(self, text: bytes) -> list[int]:
        """A text as the tokenizer cuts it, up to its last whole character. The tokens may stand for
        other bytes: some vocabularies put a space in front of a text.
        """
        characters = codecs.getincrementaldecoder("utf-8")("ignore").decode(text)
        return self._tokenizer.encode(characters, add_special_tokens=False)

    def llguidance(self) -> Any:
        """The LLTokenizer; the first call makes it: half a second for 150 000 tokens.

        Raises:
            RequestError: the model has no stop token.
            TokenizerError: a vocabulary whose tokens have no bytes of their own.
        """
        with self._lock:
            if self._table is None:
                self._table = self._make()
            return self._table

    def _make(self) -> Any:
        if not self.stops:
            raise RequestError(
                "structured output needs a model with a stop token, to end the reply with; "
                "this one has none"
            )
        tokens = [self._tokenizer.token_bytes(token) for token in range(self.vocab_size)]
        special = [token for token in self._special() if tokens[token]]
        for token, text in enumerate(tokens):
            self._usable[token] = bool(text)
        stops = sorted(self.stops)
        return load_llguidance().LLTokenizer(_Wrapper(tokens, special, stops[0]), eos_token=stops)

    def _special(self) -> list[int]:
        ids = self._tokenizer.special_ids | self.stops
        return sorted(token for token in ids if token < self.vocab_size)


class _Wrapper:
    """What llguidance asks of a tokenizer; the names are llguidance's."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], stop: int) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = stop

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("no grammar of ours forces tokens, so none is asked for")
