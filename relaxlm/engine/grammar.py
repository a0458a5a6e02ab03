"""Replies that match a grammar: which tokens may come next, by llguidance.

    compiler = GrammarCompiler(tokenizer, vocab_size, stop_token_ids)     once per model
    grammar = compiler.compile(GrammarSpec("json_schema", schema_text))   once per request
    matcher = grammar.matcher()                                           once per reply

A matcher then goes with the reply: `mask` says what may come next, `accept` takes what was chosen.
A mask has exactly the tokens whose bytes may follow, however a text is cut into tokens; stop tokens
are in it exactly where the text so far is complete.

Nothing is shared between requests but the vocabulary: each compiles its own grammar, because
llguidance keeps the automata of a grammar, their limits and their errors in one place behind a lock
for all copies of it. Whatever goes wrong inside llguidance is a RequestError.
"""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from relaxlm.engine.grammar_source import lark_source
from relaxlm.engine.grammar_vocabulary import GrammarVocabulary, load_llguidance
from relaxlm.errors import RequestError

if TYPE_CHECKING:
    from relaxlm.runtime.tokenizer import Tokenizer

__all__ = ["Grammar", "GrammarCompiler", "GrammarSpec", "Matcher"]

_Result = TypeVar("_Result")

# What llguidance may spend. Its speeds: 50 000 units of fuel or 20 000 items take a millisecond.
_LIMITS = {
    "initial_lexer_fuel": 1_000_000,  # to build the regular expressions
    "max_grammar_size": 200_000,  # symbols
    "step_lexer_fuel": 200_000,  # for one mask
    "step_max_items": 50_000,  # for one mask
    "max_lexer_states": 50_000,  # 1 to 2 kB each, over the whole reply
    # A large expression is otherwise run over the whole vocabulary while it is compiled.
    "precompute_large_lexemes": False,
    # Messages would hold the reply so far.
    "verbose_errors": False,
}
# States of the parser at one place of the text. An ambiguous grammar takes time by their square or
# cube, and `accept` holds the interpreter's lock meanwhile: 25 ms at worst for 1000. JSON is never
# ambiguous, but has four for each property that may be left out.
_ROW_LIMITS = {"lark": 1_000}
_ROW_LIMIT = 2_000
# llguidance is recursive in places; a chain of thousands of rules needs some megabytes.
_COMPILE_STACK_BYTES = 256 << 20
_CACHED_SOURCES = 64
_MESSAGE_LENGTH = 400


@dataclass(frozen=True)
class GrammarSpec:
    """What a reply must match.

    Attributes:
        kind: "json_object" any JSON object (`source` is not used); "json_schema" a JSON text that
            fits the schema; "regex" a text that matches as a whole, in the syntax of Rust's regex
            crate; "lark" a grammar in llguidance's dialect; "choice" one of several texts.
        source: the schema, the expression, the grammar, or a JSON list of texts.
        trusted: a lark grammar of relaxlm's own; those of requests are checked, and may not have
            everything that llguidance takes.
    """

    kind: Literal["json_object", "json_schema", "regex", "lark", "choice"]
    source: str = ""
    trusted: bool = False


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Thread-safe."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, stop_token_ids: Collection[int]
    ) -> None:
        """
        Args:
            vocab_size: how many tokens a mask covers. Ids from there on are never allowed, nor are
                those that the tokenizer does not have.
            stop_token_ids: what may end a reply. They are never taken for text.
        """
        self._vocabulary = GrammarVocabulary(tokenizer, vocab_size, stop_token_ids)
        self._lark: OrderedDict[GrammarSpec, str] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, spec: GrammarSpec) -> Grammar:
        """Check and compile. Milliseconds for most, up to about a second for those near the limits,
        without holding the interpreter's lock; the first call also prepares the vocabulary.

        Raises:
            RequestError: not a grammar, something in it that is not supported, or too large; or
                llguidance is not installed.
        """
        llguidance = load_llguidance()
        lark = self._source(spec)
        vocabulary = self._vocabulary
        tokens = vocabulary.llguidance()

        def build() -> Any:
            limits = llguidance.LLParserLimits(
                **_LIMITS, max_items_in_row=_ROW_LIMITS.get(spec.kind, _ROW_LIMIT)
            )
            matcher = llguidance.LLMatcher(tokens, lark, log_level=0, limits=limits)
            # Shows whether any text matches, and whether the beginning is within the limits.
            trial = matcher.deep_copy()
            trial.compute_bitmask()
            return trial if trial.is_error() else matcher

        start = _guarded("the grammar cannot be compiled", lambda: _on_large_stack(build))
        if start.is_error():
            raise RequestError(f"{_NAMES[spec.kind]}: {_explained(start.get_error(), spec.kind)}")
        return Grammar(start, vocabulary)

    def _source(self, spec: GrammarSpec) -> str:
        with self._lock:
            if spec in self._lark:
                self._lark.move_to_end(spec)
                return self._lark[spec]
        lark = lark_source(spec.kind, spec.source, spec.trusted)
        with self._lock:
            self._lark[spec] = lark
            while len(self._lark) > _CACHED_SOURCES:
                self._lark.popitem(last=False)
        return lark


_NAMES = {
    "json_object": "JSON object",
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "lark": "lark grammar",
    "choice": "choice",
}


class Grammar:
    """A compiled grammar, for one request: its matchers share the automata that they build."""

    def __init__(self, start: Any, vocabulary: GrammarVocabulary) -> None:
        self._start = start
        self._vocabulary = vocabulary

    def matcher(self) -> Matcher:
        """A matcher at the start of a reply. Microseconds."""
        return Matcher(self._start.deep_copy(), self._vocabulary)


class Matcher:
    """Where a reply stands in its grammar. For one thread at a time."""

    def __init__(self, state: Any, vocabulary: GrammarVocabulary) -> None:
        self._state = state
        self._vocabulary = vocabulary
        self._words = math.ceil(vocabulary.vocab_size / 32)

    def mask(self) -> np.ndarray:
        """What may come next: [ceil(vocab_size / 32)] uint32, bit i % 32 of word i // 32 for token
        i. Tens to hundreds of microseconds, without holding the interpreter's lock.

        Raises:
            RequestError: a limit was hit.
        """
        words = np.zeros(self._words, np.uint32)
        self._run(lambda: self._state.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes))
        return words

    def accept(self, token: int) -> None:
        """The reply goes on with this token. One that is not allowed changes nothing.

        Raises:
            RequestError: the token is not allowed here, or a limit was hit.
        """
        if not self._vocabulary.has(token) or not self._run(lambda: self._consume(token)):
            raise RequestError(f"token {token} does not fit the grammar here")

    def _consume(self, token: int) -> bool:
        state = self._state
        if token in self._vocabulary.stops and (state.is_stopped() or state.is_accepting()):
            return state.consume_token(token)
        return state.try_consume_tokens([token]) == 1

    @property
    def ended(self) -> bool:
        """Whether nothing but a stop token may follow. False where that shows only in the mask,
        as for a grammar of the empty text.
        """
        return self._state.is_stopped()

    def forced(self) -> list[int]:
        """The tokens of the only text that can come next, as far as there is only one, cut as the
        tokenizer cuts it; empty if there is none. A draft for speculative decoding: that text is
        certain, but a mask allows every way to cut it. The last token is left out unless the reply
        ends behind it, because it may be cut in one with what follows.

        Raises:
            RequestError: a limit was hit.
        """
        state = self._run(self._state.deep_copy)
        text = self._run(state.compute_ff_bytes)
        tokens = self._vocabulary.cut(text)
        fitting = self._run(lambda: state.validate_tokens(tokens)) if tokens else 0
        if fitting < len(tokens):
            return tokens[:fitting]
        for token in tokens:
            state.try_consume_tokens([token])
        return tokens if state.is_stopped() else tokens[:-1]

    def fork(self) -> Matcher:
        """A matcher that goes on from here on its own."""
        return Matcher(self._run(self._state.deep_copy), self._vocabulary)

    def _run(self, call: Callable[[], _Result]) -> _Result:
        result = _guarded("the grammar failed", call)
        if self._state.is_error():
            raise RequestError(
                f"the reply's grammar cannot go on: {_shortened(self._state.get_error())}"
            )
        return result


def _guarded(what: str, call: Callable[[], _Result]) -> _Result:
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as reason:  # a panic inside llguidance is no Exception
        raise RequestError(f"{what}: {_shortened(str(reason))}") from reason


def _on_large_stack(call: Callable[[], _Result]) -> _Result:
    """The result of a call that runs on a stack of its own."""
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    with _stack_size_lock:
        before = threading.stack_size(_COMPILE_STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="relaxlm-grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


_stack_size_lock = threading.Lock()


def _explained(message: str, kind: str) -> str:
    """llguidance's message, without places in a text that the request did not write."""
    if message.startswith(_NO_TEXT):
        return "no text matches it"
    if _ONE_OF in message:
        return "oneOf: not supported if two alternatives may fit the same value: use anyOf"
    if kind != "lark":
        message = _QUOTED_LINES.split(message)[0]
        message = _PLACE.sub("", message)
    return _shortened(message)


_NO_TEXT = "NoExtensionBias"
_ONE_OF = "oneOf constraints are not supported"
_QUOTED_LINES = re.compile(r"\n\s*\d+ \| ")
_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")


def _shortened(message: str) -> str:
    message = " ".join(message.replace("<non-verbose/>", "").split())
    if len(message) > _MESSAGE_LENGTH:
        message = message[:_MESSAGE_LENGTH] + " …"
    return message
