"""Replies of gpt-oss, messages on channels, and of models whose reasoning stands between special
tokens, as one text: the reasoning between <think> and </think>, then the answer.

Other models that reason write their replies so by themselves. The engine's parser of replies tells
the parts apart; it is imported for models that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relaxlm.runtime.tokenizer import Tokenizer
from relaxlm.runtime.turn_end import writes_channels

if TYPE_CHECKING:
    from relaxlm.engine.replies import Delta, ReplyParser

_BEGIN, _END = "<think>\n", "\n</think>\n\n"
# What reasoning begins with in models that have special tokens for it: Magistral, Command R7B,
# Apertus, Seed-OSS and others. Special tokens are not shown as text.
_MARKS = ("[THINK]", "<|START_THINKING|>", "<|inner_prefix|>", "<seed:think>", "<think>")


@dataclass(frozen=True)
class ChannelFormat:
    """How the replies of a model with channels, or with tokens around its reasoning, are read.

    Attributes:
        shown: the special tokens that part the messages.
        new: begins to read the reply to a prompt, given its token ids.
    """

    shown: frozenset[int]
    new: Callable[[Sequence[int]], ChannelText]


def channel_format(templates: Mapping[str, str], tokenizer: Tokenizer) -> ChannelFormat | None:
    """None for a model whose replies have neither.

    Args:
        templates: the texts of the model's templates by name.
    """
    marks = {tokenizer.token_to_id(mark) for mark in _MARKS} & tokenizer.special_ids
    if not marks and not any(map(writes_channels, templates.values())):
        return None
    from relaxlm.engine.replies import reply_format

    found = reply_format(templates, tokenizer)
    shown = found.shown_special(None)
    begin = None if found.reasoning is None else tokenizer.token_to_id(found.reasoning.begin)
    if not found.channels and begin not in shown:
        return None

    def new(prompt: Sequence[int]) -> ChannelText:
        # A line end may follow what opens the reasoning.
        inside = begin is not None and begin in prompt[-2:]
        return ChannelText(found.parser(starts_in_reasoning=inside))

    return ChannelFormat(shown, new)


class ChannelText:
    """Takes a reply's text with its marks, piece by piece, and gives that without them."""

    def __init__(self, parser: ReplyParser) -> None:
        self._parser = parser
        self._thinking = self._answered = False

    def push(self, text: str) -> str:
        """What of the reply is known to be text with this piece."""
        return self._spelled(self._parser.push(text))

    def finish(self) -> str:
        """What was held back, because the reply has ended. Reasoning that a limit has cut off is
        not closed.
        """
        return self._spelled(self._parser.finish())

    def _spelled(self, deltas: list[Delta]) -> str:
        parts = []
        for delta in deltas:
            if delta.reasoning_content and not self._thinking:
                parts.append("\n\n" + _BEGIN if self._answered else _BEGIN)
            elif delta.content and self._thinking:
                parts.append(_END)
            self._thinking = bool(delta.reasoning_content)
            self._answered |= bool(delta.content)
            parts += [delta.reasoning_content, delta.content]
        return "".join(parts)


def parted(text: str) -> dict[str, Any]:
    """The fields of a message with this reply: its answer, and the reasoning if there is one.

    The model's template leaves out the reasoning of earlier turns by itself.
    """
    if not text.startswith(_BEGIN):
        return {"content": text}
    reasoning, _, content = text.removeprefix(_BEGIN).partition(_END)
    return {"content": content, "reasoning_content": reasoning}
