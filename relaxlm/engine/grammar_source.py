"""From what a request gives to the text of a grammar in llguidance's lark dialect."""

from __future__ import annotations

import json
import re
from typing import Any

from relaxlm.engine.grammar_schema import json_rule
from relaxlm.engine.grammar_vocabulary import load_llguidance
from relaxlm.errors import RequestError

SOURCE_LIMIT_BYTES = 256 << 10
# llguidance would otherwise replace the mask by the one token with which the tokenizer cuts a text
# that is the only possible one. Ours says what the grammar allows, no less.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'


def lark_source(kind: str, source: str) -> str:
    """The whole grammar.

    Raises:
        RequestError: too large, or not what `kind` says.
    """
    size = len(source.encode("utf-8", "replace"))
    if size > SOURCE_LIMIT_BYTES:
        raise RequestError(
            f"the grammar has {size} bytes, at most {SOURCE_LIMIT_BYTES} are taken: shorten it"
        )
    if kind == "json_object":
        body = f"start: {json_rule({'type': 'object'})}"
    elif kind == "json_schema":
        body = f"start: {json_rule(_parsed(source, 'JSON schema'))}"
    elif kind == "regex":
        body = f"start: /{_regex(source)}/"
    elif kind == "choice":
        body = f"start: {_choice(source)}"
    elif kind == "lark":
        body = source
    else:
        raise RequestError(f"grammar kind {kind!r} is not known")
    return body + _OPTIONS


def _parsed(source: str, what: str) -> Any:
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as reason:
        raise RequestError(f"{what}: not JSON: {reason}") from None


def _regex(source: str) -> str:
    """An expression for between slashes. Anchors around the whole are left out: it is matched
    against the whole reply anyway, and llguidance has none.
    """
    if len(source) - len(source.rstrip("\\")) & 1:
        raise RequestError("regular expression: it ends in a backslash that escapes nothing")
    source = source.removeprefix("^")
    if re.search(r"(?<!\\)(?:\\\\)*\$\Z", source):
        source = source[:-1]
    return load_llguidance().regex_to_lark(source, "")


def literal(text: str) -> str:
    """A text as a lark string."""
    return json.dumps(text)


def _choice(source: str) -> str:
    texts = _parsed(source, "choice")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError("choice: expected a list of at least one text")
    return " | ".join(literal(text) for text in texts)
