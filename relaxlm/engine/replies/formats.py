"""The formats in which models write tool calls: one entry each, found by name or by template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from relaxlm.engine.replies import harmony, tagged_calls, xml_calls
from relaxlm.engine.replies.json_calls import calls
from relaxlm.engine.replies.reader import NotACall, Reader, Wait
from relaxlm.engine.replies.sink import Sink
from relaxlm.engine.replies.tagged_calls import (
    DEEPSEEK_BEGIN,
    DEEPSEEK_CALL,
    DEEPSEEK_CALL_END,
    DEEPSEEK_END,
    DEEPSEEK_SEP,
)
from relaxlm.engine.replies.tools import ToolRequest

ReadCalls = Callable[[Reader, Sink, str, ToolRequest], Wait]

# Marks behind which there is a call only if JSON says so.
BARE_MARKS = ("```json", "{", "[")
# What stands in a layout for the function's name, for nine letters and digits, and for a space that
# some vocabularies put there.
NAME, ID, SPACE = "{name}", "{id}", "{space}"


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
    arguments: Literal["json", "qwen", "glm"] = "json"
    several: bool = True


@dataclass(frozen=True)
class ToolFormat:
    """One way to write calls.

    Attributes:
        marks: texts behind which a call may begin.
        read: what comes behind a mark.
        layout: how a grammar makes the model write calls.
        hints: all of these texts in a chat template mean this format.
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


def _bare(reader: Reader, sink: Sink, mark: str, tools: ToolRequest) -> Wait:
    if mark == "<|python_tag|>":
        return calls(reader, sink)
    return tagged_calls.bare(reader, sink, mark, tools.names)


def _tool_call(reader: Reader, sink: Sink, mark: str, tools: ToolRequest) -> Wait:
    """A model of one release may write what another was trained on: JSON, or Qwen3-Coder's tags."""
    if mark == "<function=":
        yield from _function(reader, sink, tools)
        return
    if (yield from reader.skip_after_space("<function=")):
        yield from _function(reader, sink, tools)
        yield from reader.skip_after_space("</tool_call>")
    else:
        yield from tagged_calls.in_tags(reader, sink, "</tool_call>")


def _glm(reader: Reader, sink: Sink, mark: str, tools: ToolRequest) -> Wait:
    return xml_calls.glm_call(reader, sink, tools.functions)


def _function(reader: Reader, sink: Sink, tools: ToolRequest) -> Wait:
    start = reader.pos
    try:
        yield from xml_calls.qwen_call(reader, sink, tools.functions)
    except NotACall:
        reader.back(start)
        yield from tagged_calls.function_tag(reader, sink)


def _mistral(reader: Reader, sink: Sink, mark: str, tools: ToolRequest) -> Wait:
    return tagged_calls.mistral(reader, sink)


def _deepseek(reader: Reader, sink: Sink, mark: str, tools: ToolRequest) -> Wait:
    return tagged_calls.deepseek(reader, sink)


def _phi4(reader: Reader, sink: Sink, mark: str, tools: ToolRequest) -> Wait:
    return tagged_calls.in_tags(reader, sink, "<|/tool_call|>")


def _cohere(reader: Reader, sink: Sink, mark: str, tools: ToolRequest) -> Wait:
    return tagged_calls.cohere(reader, sink)


def _harmony(reader: Reader, sink: Sink, mark: str, tools: ToolRequest) -> Wait:
    raise NotACall  # calls are messages of their own: harmony.read_harmony
    yield


_ARGUMENTS = f'{{"name": "{NAME}", "arguments": '
_PARAMETERS = f'{{"name": "{NAME}", "parameters": '
_DEEPSEEK_TOKENS = (
    DEEPSEEK_BEGIN,
    DEEPSEEK_CALL,
    DEEPSEEK_SEP,
    DEEPSEEK_CALL_END,
    DEEPSEEK_END,
)
# In the order in which they are looked for.
FORMATS = (
    ToolFormat(
        "harmony",
        (),
        _harmony,
        Layout(
            f"{harmony.CHANNEL}commentary to=functions.{NAME} {harmony.CONSTRAIN}json"
            f"{harmony.MESSAGE}",
            trigger=harmony.CHANNEL,
            several=False,
        ),
        (harmony.CHANNEL, harmony.MESSAGE),
        harmony.TOKENS,
    ),
    ToolFormat(
        "deepseek_r1",
        (DEEPSEEK_BEGIN,),
        _deepseek,
        Layout(
            f"{DEEPSEEK_CALL}function{DEEPSEEK_SEP}{NAME}\n```json\n",
            f"\n```{DEEPSEEK_CALL_END}",
            DEEPSEEK_BEGIN,
            "\n",
            DEEPSEEK_END,
            DEEPSEEK_BEGIN,
        ),
        (DEEPSEEK_BEGIN, "```json"),
        _DEEPSEEK_TOKENS,
    ),
    ToolFormat(
        "deepseek",
        (DEEPSEEK_BEGIN,),
        _deepseek,
        Layout(
            f"{DEEPSEEK_CALL}{NAME}{DEEPSEEK_SEP}",
            DEEPSEEK_CALL_END,
            DEEPSEEK_BEGIN,
            "",
            DEEPSEEK_END,
            DEEPSEEK_BEGIN,
        ),
        (DEEPSEEK_BEGIN,),
        _DEEPSEEK_TOKENS,
    ),
    ToolFormat(
        "mistral_call_id",
        ("[TOOL_CALLS]",),
        _mistral,
        Layout(f"[TOOL_CALLS]{NAME}[CALL_ID]{ID}[ARGS]", trigger="[TOOL_CALLS]"),
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
        short_ids=True,
    ),
    ToolFormat(
        "mistral_args",
        ("[TOOL_CALLS]",),
        _mistral,
        Layout(f"[TOOL_CALLS]{NAME}[ARGS]", trigger="[TOOL_CALLS]"),
        ("[TOOL_CALLS]", "[ARGS]"),
        ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
        short_ids=True,
    ),
    ToolFormat(
        "mistral",
        ("[TOOL_CALLS]",),
        _mistral,
        Layout(_ARGUMENTS, "}", f"[TOOL_CALLS]{SPACE}[", ", ", "]", "[TOOL_CALLS]"),
        ("[TOOL_CALLS]",),
        ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
        short_ids=True,
    ),
    ToolFormat(
        "qwen3_coder",
        ("<tool_call>", "<function="),
        _tool_call,
        Layout(
            f"<tool_call>\n<function={NAME}>\n",
            "</function>\n</tool_call>",
            between="\n",
            trigger="<tool_call>",
            arguments="qwen",
        ),
        ("<tool_call>", "<function=", "<parameter="),
        ("<tool_call>", "</tool_call>"),
    ),
    ToolFormat(
        "glm",
        ("<tool_call>",),
        _glm,
        Layout(
            f"<tool_call>{NAME}\n",
            "</tool_call>",
            between="\n",
            trigger="<tool_call>",
            arguments="glm",
        ),
        ("<tool_call>", "<arg_key>"),
        ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    ToolFormat(
        "hermes",
        ("<tool_call>",),
        _tool_call,
        Layout(
            f"<tool_call>\n{_ARGUMENTS}",
            "}\n</tool_call>",
            between="\n",
            trigger="<tool_call>",
        ),
        ("<tool_call>",),
        ("<tool_call>", "</tool_call>"),
    ),
    ToolFormat(
        "phi4",
        ("<|tool_call|>", "functools"),
        _phi4,
        Layout(_ARGUMENTS, "}", "<|tool_call|>[", ", ", "]<|/tool_call|>", "<|tool_call|>"),
        ("<|tool|>",),
        ("<|tool_call|>", "<|/tool_call|>"),
    ),
    ToolFormat(
        "cohere",
        ("Action:",),
        _cohere,
        Layout(
            f'    {{\n        "tool_name": "{NAME}",\n        "parameters": ',
            "\n    }",
            "Action:\n```json\n[\n",
            ",\n",
            "\n]```",
            "Action:",
        ),
        ("Action:", "tool_name"),
    ),
    ToolFormat(
        "llama3",
        ("<|python_tag|>", *BARE_MARKS),
        _bare,
        Layout(_PARAMETERS, "}", between="; "),
        ("ipython", '"parameters": '),
        ("<|python_tag|>",),
    ),
    ToolFormat(
        "json",
        BARE_MARKS,
        _bare,
        Layout(_ARGUMENTS, "}", between=", ", begin="[", end="]"),
        (),
    ),
)


def format_named(name: str) -> ToolFormat | None:
    return next((entry for entry in FORMATS if entry.name == name), None)


def format_of(template: str) -> ToolFormat:
    """The format that a chat template's text speaks of; plain JSON if it speaks of none."""
    return next(entry for entry in FORMATS if all(hint in template for hint in entry.hints))
