"""From what a request gives to the text of a grammar in llguidance's lark dialect.

How such a grammar is written, for those who compose them:

    start: <|tool_call|> call | TEXT        a special token by its name, or by its id: <[151657]>
    call: "{" "name" "}" %json {"type": "object", …}    JSON text that fits a schema
    TEXT: /(.|\\n)*/                         upper case: one expression, without special tokens

`literal` writes a text as a lark string, `json_rule` in grammar_schema.py a schema. Stop tokens
are not part of a grammar: they may come where it ends.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from typing import Any

from relaxlm.engine.grammar_schema import SchemaCheck, json_rule, parse_json
from relaxlm.engine.grammar_vocabulary import load_llguidance
from relaxlm.errors import RequestError

SOURCE_LIMIT_BYTES = 256 << 10
# Compiling an expression takes time and memory by the square of its length.
REGEX_LIMIT_CHARACTERS = 4096
# llguidance would otherwise replace the mask by the one token with which the tokenizer cuts a text
# that is the only possible one. Ours says what the grammar allows, no less.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'

_LARK = re.compile(
    r"""(?P<comment>(?:\#|//)[^\n]*)
    | (?P<string>"(?:\\.|[^"\\\n])*"i?)
    | (?P<regex>/(?:\\.|[^/\\])+/[imslux]*)
    | (?P<token><[^<>\s]+>)
    | (?P<keyword>%[a-z]+)
    | (?P<name>[A-Za-z_][\w-]*)
    | (?P<space>[ \t]+)
    | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_HALF_PAIR = re.compile("[\ud800-\udfff]")
# What of the dialect the engine would have to act on.
_REFUSED_OPTIONS = frozenset(("stop", "temperature"))


def lark_source(kind: str, source: str, trusted: bool = False) -> str:
    """The whole grammar, which begins with `start:` for all kinds but "lark".

    Raises:
        RequestError: too large, or not what `kind` says.
    """
    size = len(source.encode("utf-8", "surrogatepass"))
    if size > SOURCE_LIMIT_BYTES:
        raise RequestError(
            f"the grammar has {size} bytes, at most {SOURCE_LIMIT_BYTES} are taken: shorten it"
        )
    if kind == "json_object":
        body = f"start: {json_rule({'type': 'object'})}"
    elif kind == "json_schema":
        body = f"start: {json_rule(parse_json(source, 'JSON schema'))}"
    elif kind == "regex":
        body = f"start: /{_regex(source)}/"
    elif kind == "choice":
        body = f"start: ONE_OF\nONE_OF: {_choice(source)}"
    elif kind == "lark":
        body = source if trusted else _checked(source)
    else:
        raise RequestError(f"grammar kind {kind!r} is not known")
    if _HALF_PAIR.search(body):
        raise RequestError("the grammar has half of a surrogate pair, which is no character")
    return body + _OPTIONS


def literal(text: str) -> str:
    """A text as a lark string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")


def _choice(source: str) -> str:
    texts = parse_json(source, "choice")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError("choice: expected a list of at least one text")
    return " | ".join(literal(text) for text in texts)


def _regex(source: str) -> str:
    """An expression for between slashes."""
    _check_size(len(source))
    if (len(source) - len(source.rstrip("\\"))) % 2:
        raise RequestError("regular expression: it ends in a backslash that escapes nothing")
    # An empty pair of slashes would begin a comment.
    return load_llguidance().regex_to_lark(source, "") or "(?:)"


def _check_size(characters: int) -> None:
    if characters > REGEX_LIMIT_CHARACTERS:
        raise RequestError(
            "the regular expressions have, with what they refer to, more than "
            f"{REGEX_LIMIT_CHARACTERS} characters: shorten them; a list of texts can be a choice"
        )


def _checked(source: str) -> str:
    """A grammar that a request brings, with its JSON schemas checked.

    Raises:
        RequestError: what no limit of llguidance bounds, or what the engine would not act on.
    """
    parts: list[str] = []
    sizes = _ExpressionSizes()
    patterns = 0
    previous = ""
    line_begins = True
    at = 0
    while match := _LARK.match(source, at):
        kind, text, at = match.lastgroup, match.group(), match.end()
        if kind in ("name", "regex", "string"):
            sizes.add(text, kind, line_begins)
        elif text in ("&", "~"):
            raise RequestError(
                f"lark grammar: `{text}` is not taken from requests, because the time that it "
                "takes has no bound"
            )
        elif text == "=" and previous in _REFUSED_OPTIONS:
            raise RequestError(f"lark grammar: the option {previous!r} of rules is not supported")
        elif text == "%json":
            schema, at = _json_after(source, at, text)
            check = SchemaCheck()
            text = check.rule(schema)
            patterns += check.pattern_characters
        elif text == "%llguidance":
            options, at = _json_after(source, at, text)
            if options:
                raise RequestError(f"lark grammar: the options {options} are not supported")
            text = ""
        if kind not in ("space", "comment"):
            previous = text
            line_begins = text == "\n"
        parts.append(text)
    _check_size(patterns + sizes.total())
    return "".join(parts)


def _json_after(source: str, at: int, keyword: str) -> tuple[Any, int]:
    """The JSON value that follows, and where it ends."""
    begin = re.compile(r"\s*").match(source, at)
    assert begin is not None
    try:
        return json.JSONDecoder().raw_decode(source, begin.end())
    except (ValueError, RecursionError) as reason:
        raise RequestError(f"lark grammar: no JSON behind {keyword}: {reason}") from None


class _ExpressionSizes:
    """How long the expressions of a grammar are when terminals are replaced by what they stand
    for: their names are in upper case, and they may refer to others.
    """

    def __init__(self) -> None:
        self._own: Counter[str] = Counter()
        self._named: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._definition = ""

    def add(self, text: str, kind: str, line_begins: bool) -> None:
        if kind == "name" and line_begins:
            self._definition = text
        elif kind == "name" and text.isupper() and self._definition.isupper():
            self._named[self._definition][text] += 1
        elif kind == "regex":
            self._own[self._definition] += len(text)
        elif kind == "string" and self._definition.isupper():
            self._own[self._definition] += 1

    def total(self) -> int:
        """In characters; a string counts as one."""
        sizes: dict[str, int] = {}
        for name in [*self._own, *self._named]:
            self._expand(name, sizes)
        return sum(sizes.values())

    def _expand(self, name: str, sizes: dict[str, int]) -> None:
        pending = [name]
        while pending:
            name = pending[-1]
            missing = [other for other in self._named[name] if other not in sizes]
            if name not in sizes and missing:
                sizes[name] = 0  # one that refers to itself is refused by llguidance
                pending += missing
                continue
            pending.pop()
            sizes[name] = self._own[name] + sum(
                sizes[other] * count for other, count in self._named[name].items()
            )
