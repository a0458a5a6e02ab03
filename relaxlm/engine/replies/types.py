"""A reply in the parts of the OpenAI API, whole and as it grows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for. `arguments` is JSON text as the model wrote it, so it may be
    cut off or not fit the function's schema.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ToolCallDelta:
    """What call number `index` has gained. The first delta of a call has `id` and `name`."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Delta:
    """What a reply has gained: one of the three parts."""

    content: str = ""
    reasoning_content: str = ""
    tool_call: ToolCallDelta | None = None


@dataclass(frozen=True)
class ReplyMessage:
    """A whole reply. `content` is None beside tool calls if there is no text."""

    content: str | None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
