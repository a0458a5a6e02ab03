"""What tests of replies share: tools, parsers, and messages that agree with their deltas."""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from relaxlm.engine.replies import Delta, ReplyMessage, ReplyParser, ToolRequest, tool_request
from relaxlm.engine.replies.detect import reply_format
from relaxlm.runtime.tokenizer import Tokenizer
from tests.runtime.tokenizer_samples import byte_level_json

PARAMETERS = {
    "type": "object",
    "properties": {
        "s": {"type": "string"},
        "n": {"type": "integer"},
        "o": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]},
        "t": {"type": ["string", "null"]},
    },
    "$defs": {"place": {"type": "object"}},
}


def function(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


TOOLS = [function("f", parameters=PARAMETERS), function("g")]


def request() -> ToolRequest:
    asked = tool_request(TOOLS)
    assert asked is not None
    return asked


def tokenizer(special: Sequence[str] = ()) -> Tokenizer:
    settings = {"eos_token": "<|im_end|>", "additional_special_tokens": list(special)}
    return Tokenizer(byte_level_json().encode(), settings)


def numbered() -> Callable[[], str]:
    numbers = count()
    return lambda: f"id{next(numbers)}"


def parser(
    format_name: str, reasoning: str = "think", inside: bool = False, tools: bool = True
) -> ReplyParser:
    made = reply_format({}, tokenizer(), format_name, reasoning)
    return made.parser(request() if tools else None, inside, numbered())


def parsed(new: ReplyParser, pieces: Sequence[str]) -> ReplyMessage:
    """The message; its deltas are checked to be the same."""
    deltas = [delta for piece in pieces for delta in new.push(piece)] + new.finish()
    message = new.message()
    assert summed(deltas) == (
        message.content or "",
        message.reasoning_content or "",
        [(call.id, call.name, call.arguments) for call in message.tool_calls],
    )
    return message


def summed(deltas: Sequence[Delta]) -> tuple[str, str, list[tuple[str, str, str]]]:
    content = reasoning = ""
    calls: list[tuple[str, str, str]] = []
    for delta in deltas:
        content += delta.content
        reasoning += delta.reasoning_content
        call = delta.tool_call
        parts = (delta.content, delta.reasoning_content, call)
        assert sum(bool(part) for part in parts) == 1, "a delta is a piece of one part"
        if call is not None and call.id is not None:
            assert call.name is not None and call.index == len(calls)
            calls.append((call.id, call.name, call.arguments))
        elif call is not None:
            assert call.name is None and call.index == len(calls) - 1
            known = calls[-1]
            calls[-1] = (known[0], known[1], known[2] + call.arguments)
    return content, reasoning, calls
