"""Grammars made to take long, to take memory or to bring the process down."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from relaxlm.errors import RequestError
from tests.engine.grammars import allowed, byte_level, compiled, complete, follow, matches

# Far above what any of these takes, far below what they took without limits: minutes.
PATIENCE_SECONDS = 20


def _defined(count: int, last: dict[str, Any], **more: Any) -> dict[str, Any]:
    """References in a chain."""
    definitions = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}", **more} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{count}": last}}


def _rules(count: int, body: str, last: str, name: str = "r") -> str:
    """Definitions in a chain."""
    lines = [f"{name}{i}: {body.format(name + str(i + 1))}" for i in range(count)]
    return "\n".join([f"start: {name}0", *lines, f"{name}{count}: {last}"])


_INTERSECTION = " & ".join(f"/(.*a.{{{i}}})*/" for i in range(60))
_PATTERNS = " | ".join('%json {"pattern": "' + "a?" * 500 + '"}' for _ in range(5))
_PRODUCTS = [
    {"anyOf": [{"type": "object", "properties": {f"p{i}": {"const": j}}} for j in range(3)]}
    for i in range(30)
]
_LONG = {"items": {"pattern": "a?" * 1500}, "anyOf": [{"pattern": "b?" * 1500}]}

REGEX, LARK, SCHEMA = "regex", "lark", "json_schema"
REFUSED: list[tuple[str, Any, str]] = [
    (REGEX, "a" * 200_000, "more than 4096 characters"),
    (REGEX, "(" * 2000 + "a" + ")" * 2000, "invalid regex"),
    (REGEX, "(a", "unclosed group"),
    (REGEX, "a\\", "ends in a backslash"),
    (REGEX, "(?=a)b", "look-around"),
    (LARK, f"start: T\nT: {_INTERSECTION}", "`&` is not taken"),
    (LARK, "start: T\nT: ~/a/", "`~` is not taken"),
    (LARK, _rules(300, "{0} {0}", "/a?/", "R"), "more than 4096 characters"),
    (LARK, _rules(10_000, "{0} {0}", "/a?/", "R"), "more than 4096 characters"),
    (LARK, f"start: {_PATTERNS}", "more than 4096 characters"),
    (LARK, "start: " + "(" * 50_000 + '"a"' + ")" * 50_000, "deeply nested"),
    (LARK, "start: %json " + '{"items":' * 20_000, "no JSON behind %json"),
    (LARK, '%llguidance {"no_forcing": false}\nstart: "a"', "not supported"),
    (LARK, "start: a\na[temperature=0.5]: /b/", "'temperature' of rules"),
    (LARK, 'start: a "c"\na[lazy, stop = "c"]: /b/', "'stop' of rules"),
    (LARK, "%import ..etc.passwd\nstart: passwd", "Expected name"),
    (LARK, "start: start", "no text matches it"),
    (LARK, "start: <|none|>", "unknown special token"),
    (LARK, "start: none", "unknown name"),
    (SCHEMA, {"properties": {"a": {"description": "x" * 2**20}}}, "at most 262144 are taken"),
    (SCHEMA, '{"items":' * 20_000 + "{}" + "}" * 20_000, "not JSON"),
    (SCHEMA, '{"items":' * 60 + "{}" + "}" * 60, "nested deeper than 48"),
    (SCHEMA, '{"const":' + "[" * 200 + "]" * 200 + "}", "recursion limit"),
    (SCHEMA, {"anyOf": [{}] * 20_000}, "more than 10000 schemas"),
    (SCHEMA, {"properties": {f"p{i}": {} for i in range(5000)}}, "at most 400 are taken"),
    (SCHEMA, {"patternProperties": {f"^a{i}$": {} for i in range(99)}}, "more than 64 patterns"),
    (SCHEMA, _LONG, "more than 4096 characters"),
    (SCHEMA, {"allOf": _PRODUCTS}, "schema too large"),
    (SCHEMA, {"type": "string", "minLength": 10**5, "pattern": "a.*b"}, "Unable to determine"),
    (SCHEMA, {"type": "integer", "multipleOf": 999_999_937}, "fuel"),
    (SCHEMA, {"minLength": "x" + "é" * 99}, "minLength"),  # panicked inside
    ("choice", [], "a list of at least one text"),
    ("choice", [1], "a list of at least one text"),
    ("choice", ["\ud800"], "surrogate"),
]


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    REFUSED,
    ids=[f"{i}-{kind}-{message}" for i, (kind, _, message) in enumerate(REFUSED)],
)
def test_grammars_beyond_the_limits_are_refused(kind: str, source: Any, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(RequestError) as caught:
        compiled(kind, source)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 700
    assert time.monotonic() - begin < PATIENCE_SECONDS


# With a text that matches, where a short one does.
TAKEN: dict[str, tuple[str, Any, str | None]] = {
    "repetition": (REGEX, "((((a{1,50}){1,50}){1,50}){1,50}){1,50}b", "aab"),
    "nested repetition": (REGEX, "(" * 60 + "a" + "{1,1000})" * 60, None),
    "huge repetition": (REGEX, "(a{4294967295}){4294967295}|b", "b"),
    "optional pieces": (REGEX, r"\W*" * 1365, None),
    "unions": (REGEX, "(a|b)*a(a|b){500}c|b", "b"),
    "chain of rules": (LARK, _rules(15_000, "{0}", '"a"'), "a"),
    "doubled rules": (LARK, _rules(30, "{0} {0}", '"a" | ""'), "aaa"),
    "repeated rules": (LARK, 'start: r{0,1000000000}\nr: "a" | "b" r', "aba"),
    "many lines": (LARK, "start: a\n" + "// comment\n" * 20_000 + 'a: "a"', "a"),
    "chain of references": (SCHEMA, _defined(4000, {"type": "integer"}), "7"),
    "siblings": (SCHEMA, _defined(2000, {"type": "string"}, minLength=1), '"a"'),
    "items": (SCHEMA, {"type": "array", "maxItems": 10**9}, "[1]"),
    "lengths": (SCHEMA, {"type": "string", "maxLength": 10**9}, '"a"'),
    "required": (SCHEMA, {"type": "object", "required": [f"p{i}" for i in range(3000)]}, None),
    "many texts": ("choice", [f"text {i}" for i in range(15_000)], "text 14999"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_large_grammars_within_the_limits_work(name: str) -> None:
    kind, source, text = TAKEN[name]
    begin = time.monotonic()
    grammar = compiled(kind, source)
    assert allowed(grammar.matcher())
    assert text is None or matches(grammar, text)
    assert time.monotonic() - begin < PATIENCE_SECONDS


@pytest.mark.parametrize(
    ("schema", "text", "message"),
    [
        ({"enum": [[i] for i in range(3000)]}, "[", "Current row has 3000 items"),
        (
            {"type": "string", "allOf": [{"pattern": f"^(.*a.{{{i}}})*$"} for i in (50, 51)]},
            '"',
            "too many expressions",
        ),
    ],
)
def test_a_limit_that_is_hit_later_fails_this_reply_alone(
    schema: dict[str, Any], text: str, message: str
) -> None:
    sound = compiled("regex", "[ab]+").matcher()
    other = compiled("json_schema", schema).matcher()
    matcher = compiled("json_schema", schema).matcher()
    with pytest.raises(RequestError, match=f"the reply's grammar cannot go on: .*{message}"):
        matcher.accept(token_of(text))
        matcher.mask()
    for call in (matcher.mask, lambda: matcher.accept(token_of("1")), matcher.fork):
        with pytest.raises(RequestError, match=message):
            call()
    assert follow(sound, "ab") and complete(sound)
    assert token_of(text) in allowed(other)


def token_of(letter: str) -> int:
    token = byte_level().token_to_id(letter)
    assert token is not None
    return token


def test_deep_recursion_inside_the_library_stays_in_the_process(tmp_path: Path) -> None:
    """On threads with little stack of their own, in a process that may die of it."""
    script = tmp_path / "compile.py"
    script.write_text(
        "import json, sys, threading\n"
        "from tests.engine.grammars import compiled\n"
        "def work():\n"
        "    for kind, source in json.load(open(sys.argv[1])):\n"
        "        compiled(kind, source).matcher().mask()\n"
        "    print('alive')\n"
        "threading.stack_size(256 * 1024)\n"
        "thread = threading.Thread(target=work)\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps([TAKEN["chain of rules"][:2], TAKEN["chain of references"][:2]]))
    done = subprocess.run(
        [sys.executable, script, cases],
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "alive\n", done.stderr
