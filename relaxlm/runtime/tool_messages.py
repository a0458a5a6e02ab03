"""Tools in conversations, from how OpenAI's clients send them to how a chat template reads them.

Clients send a call's arguments as JSON text, no content beside calls, and ids of any length.
Templates differ: most write the arguments with `tojson` and need an object, some put the text as it
is; some fail on content that is None, others on content that is ""; Mistral's ask for ids of nine
characters. Some say nothing of tools and would leave them out without a word. So a template is
tried on a small conversation once, and told apart by what it writes.
"""

import hashlib
import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from relaxlm.errors import RequestError, TemplateError
from relaxlm.runtime.template import REASONING

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None], str]

_SHORT_ID = 9
_LETTERS = string.digits + string.ascii_letters


@dataclass(frozen=True)
class ToolHabits:
    """What a template does with tools.

    Attributes:
        tools: it writes the functions of a request.
        results: it writes messages of the role "tool".
        calls: it writes the calls of earlier turns.
        arguments_as_text: they are put as they are, and not as JSON of an object.
        flat_calls: name and arguments are read from the call itself and not from its function.
        empty_content: the content beside calls; None or "".
        short_ids: ids have nine characters.
        descriptions: a function without a description makes it fail.
        result_role: what it calls the role "tool"; GLM 4's says "observation".
        one_call: it writes but one call of a message, or fails on more.
        one_text: content and reasoning beside the same call make it fail (gpt-oss).
    """

    tools: bool
    results: bool
    calls: bool
    arguments_as_text: bool = False
    flat_calls: bool = False
    empty_content: str | None = ""
    short_ids: bool = False
    descriptions: bool = False
    result_role: str = "tool"
    one_call: bool = False
    one_text: bool = False


# A conversation to try a template on. The words are found again in what it writes.
_KEY, _NAME, _RESULT, _ABOUT = "probekey", "probe_call", "probe result", "probe description"
_SECOND = "probe_second"
_QUESTION = {"role": "user", "content": "hello"}
_OBSERVATION = "<|observation|>"


def _tool(**more: str) -> Mapping[str, Any]:
    parameters = {"type": "object", "properties": {}}
    function = {"name": "probe_tool", **more, "parameters": parameters}
    return {"type": "function", "function": function}


def _conversation(
    habits: ToolHabits, call_id: str, names: Sequence[str] = (_NAME,), **texts: str
) -> list[Message]:
    functions = [{"name": name, "arguments": {_KEY: "value"}} for name in names]
    calls = [{"id": call_id, "type": "function", "function": each} for each in functions]
    messages: list[Message] = [
        _QUESTION,
        {"role": "assistant", "content": None, **texts, "tool_calls": calls},
        {"role": "tool", "tool_call_id": call_id, "content": _RESULT},
    ]
    return fitted(messages, habits)


def habits(render: Render) -> ToolHabits:
    """Find out what a template does with tools.

    Args:
        render: the template: messages and tools to text; raises TemplateError.
    """

    def written(messages: Sequence[Message], tool: Mapping[str, Any]) -> str | None:
        try:
            return render(messages, [tool])
        except TemplateError:
            return None

    tool = _tool(description=_ABOUT)
    with_tools = _ABOUT in (written([_QUESTION], tool) or "")
    descriptions = with_tools and written([_QUESTION], _tool()) is None
    results, role = False, "tool"
    seen = written([_QUESTION, {"role": "observation", "content": _RESULT}], tool) or ""
    told = written([_QUESTION, {"role": "tool", "content": _RESULT}], tool) or ""
    if _OBSERVATION in seen and _RESULT in seen and _OBSERVATION not in told:
        results, role = True, "observation"
    for content, as_text, flat in product((None, ""), (False, True), (False, True)):
        found = ToolHabits(with_tools, True, True, as_text, flat, content, False, descriptions)
        text = written(_conversation(found, "a" * _SHORT_ID), tool) or ""
        results = results or _RESULT in text
        # Python's spelling of a dictionary, and of no content.
        if _NAME in text and _KEY in text and f"'{_KEY}'" not in text and "None" not in text:
            long_id = written(_conversation(found, "call_" + "a" * _SHORT_ID), tool)
            two_calls = written(_conversation(found, "a" * _SHORT_ID, (_NAME, _SECOND)), tool)
            one = _conversation(found, "a" * _SHORT_ID, content="Wait.")
            both = _conversation(found, "a" * _SHORT_ID, content="Wait.", reasoning_content="hm")
            return replace(
                found,
                results=_RESULT in text,
                short_ids=long_id is None,
                one_call=_SECOND not in (two_calls or ""),
                one_text=written(one, tool) is not None and written(both, tool) is None,
            )
    return ToolHabits(with_tools, results, False, descriptions=descriptions, result_role=role)


# What clients send


def checked_calls(message: Message, index: int) -> Message:
    """A message whose calls have their arguments as objects; without `tool_calls` if it has none.

    Raises:
        RequestError: calls of another shape, or arguments that are no JSON object.
    """
    if "tool_calls" not in message:
        return message
    given = message["tool_calls"]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    if not given:
        return rest
    if not isinstance(given, list | tuple):
        raise RequestError(f"message {index} has tool_calls of another type than a list")
    return {**rest, "tool_calls": [_call(call, index, i) for i, call in enumerate(given)]}


def _call(call: object, index: int, i: int) -> Mapping[str, Any]:
    where = f"message {index}: tool_calls[{i}]"
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise RequestError(f"{where} is no call of a function: expected an object with function")
    if not isinstance(function.get("name"), str):
        raise RequestError(f"{where}.function.name is missing: expected text")
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as reason:
            raise RequestError(f"{where}.function.arguments is not JSON: {reason}") from None
    if not isinstance(arguments, Mapping):
        raise RequestError(
            f"{where}.function.arguments is of type {type(arguments).__name__}: "
            "expected a JSON object"
        )
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


# What templates read


def fitted(messages: Sequence[Message], habits: ToolHabits) -> list[Message]:
    """Checked messages as a template with these habits reads them."""
    if habits.one_call:
        messages = _one_call_each(messages)
    names: dict[str, str] = {}  # of functions, by the ids of their calls
    result: list[Message] = []
    for message in messages:
        changed = dict(message)
        if "tool_calls" in message:
            calls = message["tool_calls"]
            names |= {str(call["id"]): call["function"]["name"] for call in calls if "id" in call}
            changed["tool_calls"] = [_fitted_call(call, habits) for call in calls]
            changed["content"] = message.get("content") or habits.empty_content
            if habits.one_text:
                _join_texts(changed, habits)
        call_id = message.get("tool_call_id")
        if isinstance(call_id, str):
            # Clients leave the name out, which some templates write.
            if changed.get("name") is None and call_id in names:
                changed["name"] = names[call_id]
            if habits.short_ids:
                changed["tool_call_id"] = short_id(call_id)
        if changed.get("role") == "tool":
            changed["role"] = habits.result_role
        result.append(changed)
    return result


def _one_call_each(messages: Sequence[Message]) -> list[Message]:
    """Messages with several calls as several messages, each with the call's result behind it."""
    results = {message["tool_call_id"]: message for message in messages if _answers(message)}
    moved: set[object] = set()
    parted: list[Message] = []
    for message in messages:
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            if not _answers(message) or message["tool_call_id"] not in moved:
                parted.append(message)
            continue
        for i, call in enumerate(calls):
            said = message if i == 0 else {"role": message["role"], "content": None}
            parted.append({**said, "tool_calls": [call]})
            call_id = call.get("id")
            if call_id in results and call_id not in moved:
                parted.append(results[call_id])
                moved.add(call_id)
    return parted


def _answers(message: Message) -> bool:
    return message.get("role") == "tool" and isinstance(message.get("tool_call_id"), str)


def _join_texts(message: dict[str, Any], habits: ToolHabits) -> None:
    """Put what is said beside a call behind the reasoning, where there is any."""
    name = next((name for name in REASONING if message.get(name)), None)
    if name is not None and message["content"]:
        message[name] = f"{message[name]}\n\n{message['content']}"
        message["content"] = habits.empty_content


def _fitted_call(call: Mapping[str, Any], habits: ToolHabits) -> Mapping[str, Any]:
    function = dict(call["function"])
    if habits.arguments_as_text:
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    changed = {**call, "function": function}
    if habits.flat_calls:
        changed = {**function, **changed}
    if habits.short_ids and isinstance(call.get("id"), str):
        changed["id"] = short_id(call["id"])
    return changed


def short_id(call_id: str) -> str:
    """Nine letters and digits for an id, always the same; an id of nine stays as it is."""
    if len(call_id) == _SHORT_ID:
        return call_id
    number = int.from_bytes(hashlib.sha256(call_id.encode("utf-8", "replace")).digest(), "big")
    letters = []
    for _ in range(_SHORT_ID):
        number, digit = divmod(number, len(_LETTERS))
        letters.append(_LETTERS[digit])
    return "".join(letters)


def complete_tools(
    tools: Sequence[Mapping[str, Any]], descriptions: bool
) -> list[Mapping[str, Any]]:
    """Tools with what clients may leave out and templates rely on.

    Args:
        descriptions: whether functions get an empty description.
    """
    completed = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping):
            more: dict[str, Any] = {}
            if function.get("parameters") is None:
                more["parameters"] = {"type": "object", "properties": {}}
            if descriptions and function.get("description") is None:
                more["description"] = ""
            tool = {**tool, "function": {**function, **more}}
        completed.append(tool)
    return completed


# Templates that leave calls to the message's text. What they were trained on: mark of the format in
# the template -> text in front of all calls, of each, behind each, between them, behind all.
_TEXTS: Mapping[str, tuple[str, str, str, str, str]] = {
    "<tool_call>": ("", "<tool_call>\n", "\n</tool_call>", "\n", ""),
    "<|tool|>": ("<|tool_call|>[", "", "", ", ", "]<|/tool_call|>"),
    "<|tool_call|>": ("<|tool_call|>[", "", "", ", ", "]"),
    "List of tools: ": ("<|tool_call_start|>[", "", "", ", ", "]<|tool_call_end|>"),
    "<tool> ": ("", "<toolcall> ", " </toolcall>", "\n", ""),
}


def calls_as_text(message: Message, source: str) -> Message | None:
    """A message with its calls in its content, for a template that writes none itself; None if the
    template's text does not say how.
    """
    found = next((texts for mark, texts in _TEXTS.items() if mark in source), None)
    if found is None:
        return None
    begin, before, after, between, end = found
    calls = [
        before
        + json.dumps(
            {"name": call["function"]["name"], "arguments": call["function"]["arguments"]},
            ensure_ascii=False,
        )
        + after
        for call in message["tool_calls"]
    ]
    text = begin + between.join(calls) + end
    content = message.get("content")
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": f"{content}\n{text}" if content else text}


def calls_as_turns(message: Message, source: str) -> list[Message] | None:
    """A message as turns of its own for each call, with the function's name as `metadata` (GLM 4);
    None if the template's text does not speak of it.
    """
    if "metadata" not in source:
        return None
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    turns: list[Message] = [rest] if rest.get("content") else []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        turns.append({"role": "assistant", "metadata": function["name"], "content": arguments})
    return turns


def tools_in_system_message(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], as_text: bool = True
) -> list[Message]:
    """For templates that read the functions from `tools` of the system message: as text (Phi 4), or
    as they are (GLM 4).
    """
    text: object = list(tools)
    if as_text:
        text = json.dumps([tool.get("function", tool) for tool in tools], ensure_ascii=False)
    rest = list(messages)
    system: Message = {"role": "system", "content": ""}
    if rest and rest[0].get("role") == "system":
        system = rest.pop(0)
    return [{**system, "tools": text}, *rest]
