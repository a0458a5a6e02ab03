"""The formats in which models write tool calls: one entry each, found by name or by template."""

from __future__ import annotations

from relaxlm.engine.replies import harmony, tagged_calls, xml_calls
from relaxlm.engine.replies.json_calls import calls
from relaxlm.engine.replies.python_calls import python_calls
from relaxlm.engine.replies.reader import NotACall, Reader, Wait
from relaxlm.engine.replies.sink import Sink
from relaxlm.engine.replies.tagged_calls import (
    DEEPSEEK_BEGIN,
    DEEPSEEK_CALL,
    DEEPSEEK_CALL_END,
    DEEPSEEK_END,
    DEEPSEEK_SEP,
    KIMI_ARGUMENTS,
    KIMI_BEGIN,
    KIMI_CALL,
    KIMI_CALL_END,
    KIMI_END,
)
from relaxlm.engine.replies.tool_format import (
    BARE_MARKS,
    ID,
    NAME,
    NUMBER,
    SPACE,
    Layout,
    ReadCalls,
    ToolFormat,
)
from relaxlm.engine.replies.tools import ToolRequest
from relaxlm.engine.replies.xml_calls import MINIMAX_BEGIN, MINIMAX_END


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


def _kimi(reader: Reader, sink: Sink, mark: str, tools: ToolRequest) -> Wait:
    return tagged_calls.kimi(reader, sink)


def _minimax(reader: Reader, sink: Sink, mark: str, tools: ToolRequest) -> Wait:
    return xml_calls.minimax_calls(reader, sink, tools.functions)


def _seed(reader: Reader, sink: Sink, mark: str, tools: ToolRequest) -> Wait:
    return xml_calls.seed_call(reader, sink, tools.functions)


def _python(end: str) -> ReadCalls:
    """Reads calls as in Python up to a mark."""
    return lambda reader, sink, mark, tools: python_calls(reader, sink, end)


def _apertus(reader: Reader, sink: Sink, mark: str, tools: ToolRequest) -> Wait:
    return tagged_calls.by_name(reader, sink, "<|tools_suffix|>")


def _hunyuan(reader: Reader, sink: Sink, mark: str, tools: ToolRequest) -> Wait:
    return tagged_calls.hunyuan(reader, sink)


def _internlm2(reader: Reader, sink: Sink, mark: str, tools: ToolRequest) -> Wait:
    yield from reader.skip_space()
    yield from reader.expect("<|plugin|>")  # <|interpreter|> has code behind it
    yield from tagged_calls.in_tags(reader, sink, "<|action_end|>")


def _glm4(reader: Reader, sink: Sink, mark: str, tools: ToolRequest) -> Wait:
    return tagged_calls.named(reader, sink, mark.removesuffix("\n"))


def _until(end: str) -> ReadCalls:
    """Reads JSON up to a mark."""
    return lambda reader, sink, mark, tools: tagged_calls.in_tags(reader, sink, end)


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
        "kimi",
        (KIMI_BEGIN,),
        _kimi,
        Layout(
            f"{KIMI_CALL}functions.{NAME}:{NUMBER}{KIMI_ARGUMENTS}",
            KIMI_CALL_END,
            KIMI_BEGIN,
            "",
            KIMI_END,
            KIMI_BEGIN,
        ),
        (KIMI_BEGIN,),
        (KIMI_BEGIN, KIMI_CALL, KIMI_ARGUMENTS, KIMI_CALL_END, KIMI_END),
    ),
    ToolFormat(
        "minimax",
        (MINIMAX_BEGIN,),
        _minimax,
        Layout(
            f'<invoke name="{NAME}">\n',
            "</invoke>",
            f"{MINIMAX_BEGIN}\n",
            "\n",
            f"\n{MINIMAX_END}",
            MINIMAX_BEGIN,
            arguments="minimax",
        ),
        (MINIMAX_BEGIN,),
        (MINIMAX_BEGIN, MINIMAX_END),
    ),
    ToolFormat(
        "seed",
        ("<seed:tool_call>",),
        _seed,
        Layout(
            f"<seed:tool_call>\n<function={NAME}>\n",
            "</function>\n</seed:tool_call>",
            between="\n",
            trigger="<seed:tool_call>",
            arguments="seed",
        ),
        ("<seed:tool_call>",),
        ("<seed:tool_call>", "</seed:tool_call>"),
    ),
    ToolFormat(
        "lfm2",
        ("<|tool_call_start|>",),
        _python("<|tool_call_end|>"),
        # Calls as in Python are what the models write by themselves; they know these, too.
        Layout(
            _ARGUMENTS,
            "}",
            "<|tool_call_start|>[",
            ", ",
            "]<|tool_call_end|>",
            "<|tool_call_start|>",
        ),
        ("<|tool_call_start|>",),
        ("<|tool_call_start|>", "<|tool_call_end|>"),
        other_hint="List of tools: ",
    ),
    ToolFormat(
        "nemotron",
        ("<TOOLCALL>",),
        _until("</TOOLCALL>"),
        Layout(_ARGUMENTS, "}", "<TOOLCALL>[", ", ", "]</TOOLCALL>", "<TOOLCALL>"),
        ("<TOOLCALL>",),
        ("<TOOLCALL>", "</TOOLCALL>"),
    ),
    ToolFormat(
        "minitron",
        ("<toolcall>",),
        _until("</toolcall>"),
        Layout(f"<toolcall> {_ARGUMENTS}", "} </toolcall>", between="\n", trigger="<toolcall>"),
        ("<extra_id_1>", "<tool> "),
        ("<toolcall>", "</toolcall>"),
    ),
    ToolFormat(
        "granite",
        # 3.0 and 3.1 write the second one.
        ("<|tool_call|>", "<tool_call>"),
        _until("</tool_call>"),
        Layout(_ARGUMENTS, "}", "<|tool_call|>[", ", ", "]", "<|tool_call|>"),
        ("<|start_of_role|>", "<|tool_call|>"),
        ("<|tool_call|>", "<tool_call>"),
    ),
    ToolFormat(
        "command_a",
        ("<|START_ACTION|>",),
        _until("<|END_ACTION|>"),
        Layout(
            f'    {{"tool_name": "{NAME}", "parameters": ',
            "}",
            "<|START_ACTION|>[\n",
            ",\n",
            "\n]<|END_ACTION|>",
            "<|START_ACTION|>",
        ),
        ("<|START_ACTION|>",),
        ("<|START_ACTION|>", "<|END_ACTION|>"),
    ),
    ToolFormat(
        "apertus",
        ("<|tools_prefix|>",),
        _apertus,
        Layout(
            f'{{"{NAME}": ', "}", "<|tools_prefix|>[", ", ", "]<|tools_suffix|>", "<|tools_prefix|>"
        ),
        ("<|tools_prefix|>",),
        ("<|tools_prefix|>", "<|tools_suffix|>"),
        in_reasoning=True,
    ),
    ToolFormat(
        "olmo3",
        ("<function_calls>",),
        _python("</function_calls>"),
        Layout(
            f"{NAME}(",
            ")",
            "<function_calls>",
            "\n",
            "</function_calls>",
            "<function_calls>",
            arguments="python",
        ),
        ("<function_calls>",),
        ("<function_calls>", "</function_calls>"),
    ),
    ToolFormat(
        "internlm2",
        ("<|action_start|>",),
        _internlm2,
        Layout(
            f"<|action_start|><|plugin|>\n{_PARAMETERS}",
            "}<|action_end|>",
            trigger="<|action_start|>",
            several=False,
        ),
        ("<|plugin|>",),
        ("<|action_start|>", "<|plugin|>", "<|action_end|>"),
    ),
    ToolFormat(
        "hunyuan",
        ("<tool_calls>",),
        _hunyuan,
        Layout(
            f"<tool_call>{NAME}\n```json\n",
            "\n```</tool_call>",
            "<tool_calls>\n",
            "\n",
            "\n</tool_calls>",
            "<tool_calls>",
        ),
        ("<tool_calls>", "<tool_call>", "```json"),
        ("<tool_calls>", "</tool_calls>", "<tool_call>", "</tool_call>"),
    ),
    ToolFormat(
        "tool_calls",
        ("<tool_calls>",),
        _hunyuan,
        Layout(_ARGUMENTS, "}", "<tool_calls>[", ", ", "]</tool_calls>", "<tool_calls>"),
        ("<tool_calls>",),
        ("<tool_calls>", "</tool_calls>"),
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
        "glm4",
        (),
        _glm4,
        Layout(f"{NAME}\n", between="\n"),
        ("[gMASK]",),
        named=True,
    ),
    ToolFormat(
        "phi4",
        ("<|tool_call|>", "functools"),
        _until("<|/tool_call|>"),
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
    return next(entry for entry in FORMATS if entry.is_meant_by(template))
