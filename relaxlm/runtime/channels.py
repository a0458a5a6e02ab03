"""Replies of gpt-oss, messages on channels, as one text: the analysis between <think> and </think>,
then the answer.

Other models that reason write their replies so by themselves. The engine's parser of replies tells
the channels apart; it is imported for models that have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relaxlm.runtime.tokenizer import Tokenizer
from relaxlm.runtime.turn_end import writes_channels

if TYPE_CHECKING:
    from relaxlm.engine.replies import Delta, ReplyParser

_BEGIN, _END = "<think>\n", "\n</think>\n\n"


@dataclass(frozen=True)
class ChannelFormat:
    """How the replies of a model with channels are read.

    Attributes:
        shown: the special tokens that part the messages.
        new: begins to read a reply.
    """

    shown: frozenset[int]
    new: Callable[[], ChannelText]


def channel_format(templates: Mapping[str, str], tokenizer: Tokenizer) -> ChannelFormat | None:
    """None for a model whose replies have no channels.

    Args:
        templates: the texts of the model's templates by name.
    """
    if not any(map(writes_channels, templates.values())):
        return None
    from relaxlm.engine.replies import reply_format

    found = reply_format(templates, tokenizer)
    return ChannelFormat(found.shown_special(None), lambda: ChannelText(found.parser()))


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
