"""Grammars that make a model write calls as its format has them.

Two kinds, in llguidance's lark dialect. If a call is required, the reply is calls and nothing else.
If the model may choose, text is free up to the text behind which a call follows, and a call then
is one of the functions that may be called. Both let the model reason first.

The arguments of a `strict` function follow its schema to the letter, or the schema is refused. For
others, what llguidance does not know in a schema is left out, and where the model may choose they
are any object.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from relaxlm.engine.grammar import GrammarSpec
from relaxlm.engine.grammar_schema import json_rule
from relaxlm.engine.grammar_source import lark_source, literal
from relaxlm.engine.replies.harmony import CHANNEL, END, MESSAGE, START
from relaxlm.engine.replies.json_calls import KNOWN_KEYS
from relaxlm.engine.replies.parser import ReasoningTags
from relaxlm.engine.replies.python_arguments import python_arguments
from relaxlm.engine.replies.tool_format import BARE_MARKS, ID, NAME, NUMBER, SPACE, ToolFormat
from relaxlm.engine.replies.tools import Function, ToolRequest
from relaxlm.engine.replies.xml_arguments import tagged_arguments

_FILL = {SPACE: '" "?', ID: "CALL_ID", NUMBER: "CALL_NUMBER"}
_SPACE = r"/[ \t\r\n]{0,8}/"
_TERMINALS = r"""TEXT: /(?s:.*)/
WHITE: /[ \t\r\n]{1,8}/
CALL_ID: /[a-zA-Z0-9]{9}/
CALL_NUMBER: /[0-9]{1,3}/
"""
# An object that the parser of calls without marks would look into.
_BARE_CALL = r"/\{[ \t\r\n]*\"([^\"]*\\|(" + "|".join(sorted(KNOWN_KEYS)) + r")\")/"


class Rules:
    """The rules of a grammar, by name, and what is special in its texts."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        marks = sorted((*special, *_FILL), key=len, reverse=True)
        self._marks = re.compile("(" + "|".join(map(re.escape, marks)) + ")")
        self._rules: dict[str, str] = {}

    def add(self, name: str, body: str, options: str = "") -> str:
        """Name a rule, and give its name back."""
        self._rules[name] = f"{name}{options}: {body}\n"
        return name

    def text(self, text: str) -> str:
        """What matches a text; special tokens are matched as tokens."""
        parts = [part for part in self._marks.split(text) if part]
        return " ".join(
            f"<[{self._special[part]}]>"
            if part in self._special
            else _FILL.get(part) or literal(part)
            for part in parts
        )

    def up_to(self, mark: str, name: str, before: str = "TEXT") -> str:
        """Any text that ends with the first `mark`."""
        if mark in self._special:
            return f"{before} {self.text(mark)}"
        return self.add(name, f"{before} {literal(mark)}", "[lazy]")

    def source(self, start: str) -> str:
        return f"start: {start}\n{''.join(self._rules.values())}{_TERMINALS}"


class ReplyGrammar:
    """Writes the grammars of one format for one vocabulary."""

    def __init__(
        self, tools: ToolFormat, reasoning: ReasoningTags | None, special: Mapping[str, int]
    ) -> None:
        """
        Args:
            special: text -> id of what is a special token; grammars name these by id.
        """
        self._tools = tools
        self._layout = tools.layout
        self._channels = tools.name == "harmony"
        self._reasoning = reasoning
        self._special = special

    def calls(self, request: ToolRequest, inside: bool) -> GrammarSpec | None:
        """What the reply to a request with tools must match; None if the model is free.

        Args:
            inside: the prompt ends inside of the reasoning.

        Raises:
            RequestError: a strict function whose schema the format cannot keep to.
        """
        if not request.constrained:
            return None
        rules = Rules(self._special)
        bodies = [
            self._arguments(rules, function, i, request.required)
            for i, function in enumerate(request.functions)
        ]
        thinking = self._thinking(rules, inside)
        several = request.parallel and self._layout.several
        if request.required:
            answer = self._group(rules, request.functions, bodies, several)
        elif self._channels:
            answer = self._on_channels(rules, request.functions, bodies)
        elif self._layout.trigger:
            free = self._free(request.names, inside)
            answer = self._triggered(rules, request.functions, bodies, several, free)
        else:
            group = self._group(rules, request.functions, bodies, several, after_space=True)
            rules.add("FREE", self._free(request.names, inside))
            answer = f"({group} | FREE)"
        return GrammarSpec("lark", rules.source(f"{thinking} {answer}"), trusted=True)

    def after_reasoning(self, spec: GrammarSpec, inside: bool) -> GrammarSpec:
        """The same for the answer alone: a model that reasons may do so first.

        A grammar of the kind "lark" is for the whole reply and stays as it is.
        """
        if spec.kind == "lark" or (self._reasoning is None and not self._channels):
            return spec
        rules = Rules(self._special)
        start = self._thinking(rules, inside)
        if self._channels:
            start += " " + rules.text(f"{CHANNEL}final{MESSAGE}")
        body = lark_source(spec.kind, spec.source)
        assert body.startswith("start:")
        answer = "answer:" + body.removeprefix("start:")
        return GrammarSpec("lark", rules.source(f"{start} answer") + answer, trusted=True)

    def _thinking(self, rules: Rules, inside: bool) -> str:
        if self._channels:
            thought = rules.up_to(END, "thought")
            begin, end = f"{CHANNEL}analysis{MESSAGE}", f"{START}assistant"
            return f"({rules.text(begin)} {thought} {rules.text(end)})?"
        if self._reasoning is None:
            return ""
        marks = [mark for mark in self._tools.marks if mark not in self._special]
        before = "TEXT"
        if self._tools.in_reasoning and marks:
            texts = " | ".join(map(literal, marks))
            before = rules.add("QUIET", f"TEXT & ~(TEXT ({texts}) TEXT)")
        thought = rules.up_to(self._reasoning.end, "thought", before)
        if inside:
            return f"{thought} WHITE?"
        return f"({rules.text(self._reasoning.begin)} {thought} WHITE?)?"

    def _arguments(self, rules: Rules, function: Function, i: int, required: bool) -> str:
        if self._layout.arguments == "python":
            return python_arguments(rules, function, i)
        if self._layout.arguments != "json":
            return tagged_arguments(rules, function, i, self._layout.arguments)
        return rules.add(f"arguments_{i}", arguments_rule(function, required))

    def _call(
        self,
        rules: Rules,
        name: str,
        functions: Sequence[Function],
        bodies: Sequence[str],
        before: str,
        after_space: bool = False,
    ) -> str:
        """The rule `name`: one call of any of the functions, with `before` in front."""
        calls = []
        for i, (function, body) in enumerate(zip(functions, bodies, strict=True)):
            text = before.replace(NAME, function.name)
            begin = rules.text(text)
            if after_space:
                begin = rules.add(f"{name.upper()}_{i}", f"{_SPACE} {literal(text)}")
            call = f"{begin} {body} {rules.text(self._layout.after)}"
            calls.append(rules.add(f"{name}_{i}", call))
        return rules.add(name, " | ".join(calls))

    def _group(
        self,
        rules: Rules,
        functions: Sequence[Function],
        bodies: Sequence[str],
        several: bool,
        cut: str = "",
        after_space: bool = False,
    ) -> str:
        """One call or several, with what stands around them.

        Args:
            cut: text at the beginning that is there already.
            after_space: there may be white space in front. It belongs to the first text of the
                call then, and both are one terminal: free text is another, and would be taken
                for as long as it matches.
        """
        layout = self._layout
        begin = layout.begin.removeprefix(cut) + layout.before
        first = self._call(rules, "first", functions, bodies, begin, after_space)
        more = ""
        if several:
            call = self._call(rules, "call", functions, bodies, layout.before)
            more = f"({rules.text(layout.between)} {call})*"
        return f"{first} {more} {rules.text(layout.end)}"

    def _triggered(
        self,
        rules: Rules,
        functions: Sequence[Function],
        bodies: Sequence[str],
        several: bool,
        free: str,
    ) -> str:
        """Free text, and calls behind the text that announces one."""
        trigger = self._layout.trigger
        rules.add("FREE", free)
        head = rules.up_to(trigger, "head", "FREE")
        if self._layout.begin:
            unit = self._group(rules, functions, bodies, several, trigger)
        else:
            before = self._layout.before.removeprefix(trigger)
            unit = self._call(rules, "call", functions, bodies, before)
        return f"({head} {unit}){'*' if several else '?'} FREE"

    def _free(self, names: Collection[str], inside: bool) -> str:
        """Text in which the parser finds nothing that may be a call of these functions."""
        texts = [
            literal(mark)
            for mark in self._tools.marks_of(names)
            if mark not in self._special and mark not in BARE_MARKS
        ]
        if any(mark in BARE_MARKS for mark in self._tools.marks):
            texts.append(_BARE_CALL)
        free = f"TEXT & ~(TEXT ({' | '.join(texts)}) TEXT)" if texts else "TEXT"
        if self._reasoning is not None and not inside:
            # Otherwise the reasoning would be free text, and what it says of calls a call.
            free += f" & ~({literal(self._reasoning.begin)} TEXT)"
        return free

    def _on_channels(
        self, rules: Rules, functions: Sequence[Function], bodies: Sequence[str]
    ) -> str:
        final = f"{rules.text(CHANNEL + 'final' + MESSAGE)} TEXT"
        said = rules.up_to(END, "said")
        preamble = (
            f"({rules.text(CHANNEL + 'commentary' + MESSAGE)} {said} "
            f"{rules.text(START + 'assistant')})?"
        )
        call = self._call(rules, "call", functions, bodies, self._layout.before)
        return f"({final} | {preamble} {call})"


def arguments_rule(function: Function, required: bool) -> str:
    """The arguments of a function as JSON.

    Args:
        required: a call is required, so that the model is held to the schema as far as possible.
    """
    if not required and not function.strict:
        return json_rule({"type": "object"})
    return json_rule(dict(function.parameters), lenient=not function.strict)
