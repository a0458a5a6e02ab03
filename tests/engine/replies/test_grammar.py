"""Random replies within a grammar of ours are what the request asks for, read by our parser."""

import json
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from relaxlm.engine.grammar import Grammar, GrammarCompiler, GrammarSpec
from relaxlm.engine.replies import ReplyFormat, ReplyMessage, reply_format, tool_request
from relaxlm.engine.replies.formats import FORMATS
from relaxlm.errors import RequestError
from relaxlm.runtime.token_decoding import StreamDecoder
from relaxlm.runtime.tokenizer import Tokenizer
from tests.engine.replies.samples import function, tokenizer

pytest.importorskip("llguidance")

STRICT = function(
    "get_weather",
    strict=True,
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"enum": ["C", "F"]},
            "at": {"$ref": "#/$defs/place"},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
        "$defs": {
            "place": {
                "type": "object",
                "properties": {"x": {"type": "boolean"}},
                "required": ["x"],
                "additionalProperties": False,
            }
        },
    },
)
TOOLS = [STRICT, function("stop"), function("free", parameters={"type": "object"})]
FREE = {"type": "function", "function": {"name": "free"}}
STRUCTURE = (b'"', b"}", b"]", b",", b"<", b">", b"{", b"\n", b":", b"/")
CONSTRAINED = [entry.name for entry in FORMATS]
# JSON between marks, as phi4's.
LIKE_PHI4 = {
    *("command_a", "granite", "hunyuan", "internlm2", "lfm2", "nemotron", "tool_calls"),
}


def fits_strict(arguments: Any) -> bool:
    """Whether arguments fit the schema of get_weather."""
    return (
        isinstance(arguments, dict)
        and {"city", "unit"} <= set(arguments) <= {"city", "days", "unit", "at"}
        and isinstance(arguments["city"], str)
        and isinstance(arguments.get("days", 0), int)
        and arguments["unit"] in ("C", "F")
        and arguments.get("at", {"x": True}) in ({"x": True}, {"x": False})
    )


@cache
def structural(vocabulary: Tokenizer) -> np.ndarray:
    """[vocab] whether a token is one of STRUCTURE."""
    return np.array([vocabulary.token_bytes(i) in STRUCTURE for i in range(vocabulary.vocab_size)])


class Walk:
    """Writes random replies that a grammar allows."""

    def __init__(
        self, vocabulary: Tokenizer, grammar: Grammar, hints: Sequence[str], seed: str
    ) -> None:
        self.vocabulary = vocabulary
        self.matcher = grammar.matcher()
        self.hints = hints
        self.random = random.Random(seed)
        self.ids: list[int] = []

    def write(self, limit: int = 250) -> bool:
        """Whether the reply has ended within `limit` tokens."""
        assert self.vocabulary.eos_id is not None
        while len(self.ids) < limit:
            if self.random.random() < (0.15 if self.ids else 0.6):
                self.try_text(self.random.choice(self.hints))
            allowed = self.allowed()
            assert len(allowed), "a reply that cannot go on"
            ends = self.vocabulary.eos_id in allowed
            structure = allowed[structural(self.vocabulary)[allowed]]
            if ends and self.random.random() < 0.2:
                return True
            some = structure if len(structure) and self.random.random() < 0.5 else allowed
            chosen = int(self.random.choice(some))
            if chosen == self.vocabulary.eos_id:
                return True
            self.accept(chosen)
        return False

    def accept(self, token: int) -> None:
        self.matcher.accept(token)
        self.ids.append(token)

    def try_text(self, text: str) -> None:
        for token in self.vocabulary.encode(text, add_special_tokens=False):
            try:
                self.accept(token)
            except RequestError:
                return

    def allowed(self) -> np.ndarray:
        bits = np.unpackbits(self.matcher.mask().view(np.uint8), bitorder="little")
        return np.flatnonzero(bits[: self.vocabulary.vocab_size])

    def text(self, shown: frozenset[int]) -> str:
        hidden = self.vocabulary.special_ids - shown
        decoder = StreamDecoder(
            self.vocabulary._decode_rules(), self.vocabulary.id_to_token, hidden
        )
        return decoder.push(self.ids) + decoder.finish()


def hints(found: ReplyFormat) -> list[str]:
    """Texts after which something happens."""
    layout = found.tools.layout
    if layout.trigger:
        return ["</think>", layout.trigger, layout.trigger]
    call = layout.begin + layout.before.replace("{name}", "stop")
    return ["</think>", "</think>" + call, call, "\n" + call]


def has_tokens(name: str) -> list[bool]:
    """Whether the marks are special tokens; both but for harmony, whose always are, and for those
    that phi4 speaks for.
    """
    return [True] if name in {"harmony", *LIKE_PHI4} else [True, False]


@pytest.mark.parametrize(
    ("name", "inside"),
    [(name, False) for name in CONSTRAINED]
    + [(name, True) for name in CONSTRAINED if name not in LIKE_PHI4],
)
def test_random_replies_are_what_was_asked_for(name: str, inside: bool) -> None:
    tokens = next(entry.tokens for entry in FORMATS if entry.name == name)
    calls = ended = 0
    for special in has_tokens(name):
        vocabulary = tokenizer((*tokens, "<think>", "</think>") if special else ())
        found = reply_format({}, vocabulary, name, "think")
        assert vocabulary.eos_id is not None
        compiler = GrammarCompiler(vocabulary, vocabulary.vocab_size, [vocabulary.eos_id])
        for choice in ("required", "auto", FREE):
            for parallel in (True, False):
                asked = tool_request(TOOLS, choice, parallel)
                assert asked is not None
                spec = found.grammar(asked, inside)
                assert spec is not None
                grammar = compiler.compile(spec)
                for i in range(4):
                    walk = Walk(vocabulary, grammar, hints(found), f"{name} {choice} {i}")
                    whole = walk.write()
                    text = walk.text(found.shown_special(asked))
                    parser = found.parser(asked, inside)
                    parser.push(text)
                    parser.finish()
                    message = parser.message()
                    check(message, asked.names, whole)
                    if whole and asked.required:
                        assert message.tool_calls and message.content is None, text
                    if not parallel:
                        assert len(message.tool_calls) <= 1, text
                    calls += len(message.tool_calls)
                    ended += whole
    assert calls > 5 and ended > 5, "the walks tell nothing"


def check(message: ReplyMessage, names: frozenset[str], whole: bool) -> None:
    for i, call in enumerate(message.tool_calls):
        assert call.name in names
        if whole or i < len(message.tool_calls) - 1:
            arguments = json.loads(call.arguments)
            assert isinstance(arguments, dict)
            assert call.name != "get_weather" or fits_strict(arguments), call


def compiled(found: ReplyFormat, vocabulary: Tokenizer, spec: GrammarSpec | None) -> Grammar:
    assert spec is not None and vocabulary.eos_id is not None
    return GrammarCompiler(vocabulary, vocabulary.vocab_size, [vocabulary.eos_id]).compile(spec)


def accepts(grammar: Grammar, vocabulary: Tokenizer, text: str) -> bool:
    """Whether a text is a whole reply."""
    walk = Walk(vocabulary, grammar, [], "")
    walk.try_text(text)
    if len(walk.ids) < len(vocabulary.encode(text, add_special_tokens=False)):
        return False
    return vocabulary.eos_id in walk.allowed()


CALL = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'


def test_which_replies_are_allowed() -> None:
    vocabulary = tokenizer()
    found = reply_format({}, vocabulary, "hermes", "think")

    def allowed(text: str, choice: Any, parallel: bool = True, inside: bool = False) -> bool:
        spec = found.grammar(tool_request(TOOLS, choice, parallel), inside)
        return accepts(compiled(found, vocabulary, spec), vocabulary, text)

    assert allowed(CALL, "required")
    assert allowed(f"{CALL}\n{CALL}", "required")
    assert not allowed(f"{CALL}\n{CALL}", "required", parallel=False)
    assert allowed(f"<think>a <tool_call> b</think>\n\n{CALL}", "required")
    assert allowed(f"a <tool_call> b</think>{CALL}", "required", inside=True)
    assert not allowed(CALL, "required", inside=True)
    assert not allowed(f"Hi {CALL}", "required")
    assert not allowed("", "required")
    assert not allowed(CALL, FREE)
    assert allowed(CALL.replace("stop", "free"), FREE)
    assert allowed("Hi <tool", "auto")
    assert allowed(f"Hi {CALL} and {CALL}.", "auto")
    assert allowed(f"Hi {CALL} and.", "auto", parallel=False)
    assert not allowed(f"Hi {CALL} and {CALL}.", "auto", parallel=False)
    assert not allowed("<tool_call> none", "auto")
    assert not allowed(CALL.replace("stop", "other"), "auto")
    assert allowed(f"<think><tool_call> none</think>{CALL}", "auto")
    weather = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "", "unit": "%s"}}\n'
    assert allowed(weather % "C" + "</tool_call>", "auto")
    assert not allowed(weather % "K" + "</tool_call>", "auto")


def test_objects_in_free_text_of_formats_without_marks() -> None:
    vocabulary = tokenizer()
    found = reply_format({}, vocabulary, "llama3", "none")
    grammar = compiled(found, vocabulary, found.grammar(tool_request(TOOLS, "auto")))
    assert accepts(grammar, vocabulary, '{"name": "stop", "parameters": {}}')
    assert accepts(grammar, vocabulary, 'In {"city": "Paris"} { or } {"')
    assert not accepts(grammar, vocabulary, '{"name": "other", "parameters": {}}')
    assert not accepts(grammar, vocabulary, 'So: { "name": "stop", "parameters": {}}')
    assert not accepts(grammar, vocabulary, 'So: {"na\\u006de": "stop", "parameters": {}}')
    assert not accepts(grammar, vocabulary, "<|python_tag|>x")


def test_a_free_model_needs_no_grammar() -> None:
    found = reply_format({}, tokenizer(), "hermes")
    assert found.grammar(None) is None
    assert found.grammar(tool_request([function("f")])) is None


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder"])
def test_what_no_grammar_knows_is_left_out_unless_strict(name: str) -> None:
    vocabulary = tokenizer()
    found = reply_format({}, vocabulary, name)
    odd = {"type": "object", "properties": {"a": {"type": "integer", "not": {"const": 1}}}}
    lenient = tool_request([function("f", parameters=odd)], "required")
    compiled(found, vocabulary, found.grammar(lenient))
    strict = tool_request([function("f", parameters=odd, strict=True)], "required")
    with pytest.raises(RequestError, match="not: not supported"):
        compiled(found, vocabulary, found.grammar(strict))


@pytest.mark.parametrize("name", ["glm", "qwen3_coder"])
def test_limits_on_strings_between_tags_are_refused_if_strict(name: str) -> None:
    found = reply_format({}, tokenizer(), name)
    limited = {"type": "object", "properties": {"a": {"type": "string", "pattern": "x+"}}}
    strict = tool_request([function("f", parameters=limited, strict=True)])
    with pytest.raises(RequestError) as caught:
        found.grammar(strict)
    assert str(caught.value) == (
        "function 'f' is strict and its argument 'a' has a pattern, which this model's format of "
        "tool calls cannot keep to: leave out one of them"
    )
    assert found.grammar(tool_request([function("f", parameters=limited)], "required"))


def test_strings_of_few_values_between_tags() -> None:
    vocabulary = tokenizer()
    found = reply_format({}, vocabulary, "glm", "none")
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    asked = tool_request([function("f", parameters=schema)], "required")
    grammar = compiled(found, vocabulary, found.grammar(asked))
    text = "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>%s</arg_value>\n</tool_call>"
    assert accepts(grammar, vocabulary, text % "x")
    assert not accepts(grammar, vocabulary, text % "z")


@pytest.mark.parametrize(
    ("spec", "answer"),
    [
        (GrammarSpec("json_object"), '{"a": 1}'),
        (GrammarSpec("json_schema", '{"type": "integer"}'), "12"),
        (GrammarSpec("regex", "ab+"), "abb"),
        (GrammarSpec("choice", '["yes", "no"]'), "no"),
    ],
)
def test_an_answer_after_reasoning(spec: GrammarSpec, answer: str) -> None:
    vocabulary = tokenizer()
    found = reply_format({}, vocabulary, "hermes", "think")
    grammar = compiled(found, vocabulary, found.after_reasoning(spec))
    for text in (answer, f"<think>hm</think>\n\n{answer}"):
        assert accepts(grammar, vocabulary, text)
    for text in ("hm", f"hm</think>{answer}", f"<think>hm</think>{answer} x", "<think>hm"):
        assert not accepts(grammar, vocabulary, text)
    inside = compiled(found, vocabulary, found.after_reasoning(spec, starts_in_reasoning=True))
    assert accepts(inside, vocabulary, f"hm</think>\n\n{answer}")
    assert not accepts(inside, vocabulary, answer)


def test_answers_without_reasoning_and_grammars_stay_as_they_are() -> None:
    spec = GrammarSpec("json_object")
    assert reply_format({}, tokenizer(), "hermes", "none").after_reasoning(spec) is spec
    lark = GrammarSpec("lark", 'start: "x"')
    assert reply_format({}, tokenizer(), "hermes", "think").after_reasoning(lark) is lark


def test_an_answer_on_harmony_s_final_channel() -> None:
    tokens = next(entry.tokens for entry in FORMATS if entry.name == "harmony")
    vocabulary = tokenizer(tokens)
    found = reply_format({}, vocabulary, "harmony")
    grammar = compiled(found, vocabulary, found.after_reasoning(GrammarSpec("choice", '["yes"]')))
    final = "<|channel|>final<|message|>yes"
    analysis = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    assert accepts(grammar, vocabulary, final) and accepts(grammar, vocabulary, analysis + final)
    assert not accepts(grammar, vocabulary, "yes")
    assert not accepts(grammar, vocabulary, "<|channel|>final<|message|>no")
