"""What a way of writing calls consists of; formats.py lists them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

from relaxlm.engine.replies.reader import Reader, Wait
from relaxlm.engine.replies.sink import Sink
from relaxlm.engine.replies.tools import ToolRequest
from relaxlm.engine.replies.xml_arguments import Style

ReadCalls = Callable[[Reader, Sink, str, ToolRequest], Wait]

# Marks behind which there is a call only if JSON says so.
BARE_MARKS = ("```json", "{", "[")
# What stands in a layout for the function's name, for nine letters and digits, for a number, and
# for a space that some vocabularies put there.
NAME, ID, NUMBER, SPACE = "{name}", "{id}", "{number}", "{space}"


@dataclass(frozen=True)
class Layout:
    """How calls are written: `begin`, calls of `before` ARGUMENTS `after` with `between` between
    them, `end`.

    Attributes:
        trigger: the text behind which a free text becomes a call; the beginning of `begin` and
            `before`. "" if calls have no mark of their own.
        arguments: JSON, or one by one in the tags of xml_calls.
        several: whether more than one call can be written.
    """

    before: str
    after: str = ""
    begin: str = ""
    between: str = ""
    end: str = ""
    trigger: str = ""
    arguments: Style | Literal["json", "python"] = "json"
    several: bool = True


@dataclass(frozen=True)
class ToolFormat:
    """One way to write calls.

    Attributes:
        marks: texts behind which a call may begin.
        read: what comes behind a mark.
        layout: how a grammar makes the model write calls.
        hints: all of these texts in a chat template mean this format.
        other_hint: so does this one alone.
        in_reasoning: a call may come before the end of the reasoning, and ends it.
        named: a call begins with a line that is a function's name and nothing else.
        tokens: texts that are tokens of their own in many vocabularies.
        short_ids: ids of nine letters and digits.
    """

    name: str
    marks: tuple[str, ...]
    read: ReadCalls
    layout: Layout
    hints: tuple[str, ...]
    tokens: tuple[str, ...] = field(default=())
    short_ids: bool = False
    other_hint: str | None = None
    named: bool = False
    in_reasoning: bool = False

    def marks_of(self, names: Collection[str]) -> tuple[str, ...]:
        """The texts behind which a call of one of these functions may begin."""
        return (*self.marks, *(f"{name}\n" for name in sorted(names) if self.named))

    def is_meant_by(self, template: str) -> bool:
        """Whether a chat template's text speaks of this format."""
        if self.other_hint is not None and self.other_hint in template:
            return True
        return all(hint in template for hint in self.hints)
