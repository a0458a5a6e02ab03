"""Collects the parts of a reply, and decides what becomes of the white space between them."""

import string
from collections.abc import Callable
from dataclasses import dataclass
from secrets import choice

from relaxlm.engine.replies.types import Delta, ReplyMessage, ToolCall, ToolCallDelta

_LETTERS = string.ascii_letters + string.digits

NewId = Callable[[], str]


def openai_id() -> str:
    return "call_" + "".join(choice(_LETTERS) for _ in range(24))


def short_id() -> str:
    """What the templates of Mistral's models ask for: nine letters and digits."""
    return "".join(choice(_LETTERS) for _ in range(9))


@dataclass
class _Call:
    id: str
    name: str
    arguments: list[str]


class Sink:
    """What a parser has found so far.

    White space around the reasoning is dropped, as the templates write it anew. White space of the
    content is kept, but for what stands before the first text if reasoning or a call came before
    it, and for what stands between the last text and the calls at the end.
    """

    def __init__(self, new_id: NewId) -> None:
        self._new_id = new_id
        self._deltas: list[Delta] = []
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[_Call] = []
        self._space = ""  # of the content, not passed on yet
        self._reasoning_space = ""
        self._has_reasoning = False
        self._trimmed = False  # whether something came before the content's first text
        self._call_is_last = False

    def content(self, text: str) -> None:
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if not kept:
            return
        if self._trimmed and not self._content:
            kept = kept.lstrip()
        self._call_is_last = False
        self._content.append(kept)
        self._deltas.append(Delta(content=kept))

    def drop_space(self) -> None:
        """Drop white space behind the content, unless more was passed on."""
        self._space = ""

    @property
    def has_reasoning(self) -> bool:
        """Whether the reply has begun with reasoning, be it empty."""
        return self._has_reasoning

    def reasoning(self, text: str) -> None:
        self._has_reasoning = True
        self._trimmed = True
        text = self._reasoning_space + text
        kept = text.rstrip()
        self._reasoning_space = text[len(kept) :]
        if not self._reasoning:
            kept = kept.lstrip()
        if kept:
            self._reasoning.append(kept)
            self._deltas.append(Delta(reasoning_content=kept))

    def call(self, name: str, call_id: str | None = None) -> None:
        """Begin a call; `arguments` belong to the last one."""
        call = _Call(call_id or self._new_id(), name, [])
        self._calls.append(call)
        self._trimmed = self._call_is_last = True
        delta = ToolCallDelta(len(self._calls) - 1, id=call.id, name=name)
        self._deltas.append(Delta(tool_call=delta))

    def arguments(self, text: str) -> None:
        if text:
            self._calls[-1].arguments.append(text)
            delta = ToolCallDelta(len(self._calls) - 1, text)
            self._deltas.append(Delta(tool_call=delta))

    def finish(self) -> None:
        if self._space and not self._call_is_last and (self._content or not self._trimmed):
            self._content.append(self._space)
            self._deltas.append(Delta(content=self._space))
        self._space = ""

    def take(self) -> list[Delta]:
        """What is new since the last time; neighbours of a kind become one."""
        deltas, self._deltas = self._deltas, []
        merged: list[Delta] = []
        for delta in deltas:
            joined = _joined(merged[-1], delta) if merged else None
            if joined is None:
                merged.append(delta)
            else:
                merged[-1] = joined
        return merged

    def message(self) -> ReplyMessage:
        content = "".join(self._content)
        calls = tuple(ToolCall(c.id, c.name, "".join(c.arguments)) for c in self._calls)
        return ReplyMessage(
            content=None if calls and not content else content,
            reasoning_content="".join(self._reasoning) or None,
            tool_calls=calls,
        )


def _joined(first: Delta, second: Delta) -> Delta | None:
    if first.tool_call and second.tool_call:
        if second.tool_call.id is not None or first.tool_call.index != second.tool_call.index:
            return None
        call = ToolCallDelta(
            first.tool_call.index,
            first.tool_call.arguments + second.tool_call.arguments,
            first.tool_call.id,
            first.tool_call.name,
        )
        return Delta(tool_call=call)
    if first.content and second.content:
        return Delta(content=first.content + second.content)
    if first.reasoning_content and second.reasoning_content:
        return Delta(reasoning_content=first.reasoning_content + second.reasoning_content)
    return None
