"""What a request says about tools: `tools`, `tool_choice`, `parallel_tool_calls`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relaxlm.errors import RequestError

MAX_TOOLS = 128  # OpenAI's limit
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NO_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Function:
    """A function that the model may call. `parameters` is a JSON schema of an object."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


@dataclass(frozen=True)
class ToolRequest:
    """The functions of a request.

    Attributes:
        tools: as they were sent, for the prompt.
        functions: those that may be called: all, or what `tool_choice` leaves.
        required: the reply must be at least one call.
        parallel: it may be more than one.
    """

    tools: tuple[Mapping[str, Any], ...]
    functions: tuple[Function, ...]
    required: bool = False
    parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.functions)

    @property
    def constrained(self) -> bool:
        """Whether the model alone is not enough to keep to what was asked for."""
        return (
            self.required
            or not self.parallel
            or len(self.functions) < len(self.tools)
            or any(function.strict for function in self.functions)
        )


def tool_request(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: object = None,
    parallel_tool_calls: bool | None = None,
) -> ToolRequest | None:
    """Check and gather what a request says about tools; plain data, as the OpenAI API has it.

    Returns:
        None if no tool may be called: there are none, or `tool_choice` is "none".

    Raises:
        RequestError: names the field.
    """
    if not tools:
        if tool_choice not in (None, "none"):
            raise RequestError(
                "tool_choice is only possible with tools: add tools, or leave it out"
            )
        if parallel_tool_calls is not None:
            raise RequestError(
                "parallel_tool_calls is only possible with tools: add tools, or leave it out"
            )
        return None
    if not isinstance(tools, list | tuple):
        raise RequestError(f"tools is of type {type(tools).__name__}: expected a list")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(tools)} entries: at most {MAX_TOOLS} are taken")
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    for i, function in enumerate(functions):
        if any(other.name == function.name for other in functions[:i]):
            raise RequestError(f"tools[{i}].function.name: a second function {function.name!r}")
    if tool_choice == "none":
        return None
    chosen, required = _choice(tool_choice, {function.name: function for function in functions})
    return ToolRequest(tuple(tools), chosen, required, parallel_tool_calls is not False)


def _function(tool: object, where: str) -> Function:
    if not isinstance(tool, Mapping):
        raise RequestError(f"{where} is of type {type(tool).__name__}: expected an object")
    if tool.get("type") != "function":
        raise RequestError(
            f"{where}.type = {tool.get('type')!r} is not supported: expected 'function'"
        )
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise RequestError(f"{where}.function is missing: expected an object with a name")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{where}.function.name = {name!r}: expected 1 to 64 letters, digits, _ and -"
        )
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise RequestError(f"{where}.function.description: expected text")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(f"{where}.function.strict = {strict!r}: expected true or false")
    parameters = function.get("parameters")
    if parameters is None or parameters == {}:
        return Function(name, _NO_PARAMETERS, bool(strict))
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise RequestError(
            f'{where}.function.parameters: expected a JSON schema of the type "object"'
        )
    properties = parameters.get("properties", {})
    if not isinstance(properties, Mapping) or not all(
        isinstance(schema, Mapping | bool) for schema in properties.values()
    ):
        raise RequestError(
            f"{where}.function.parameters.properties: expected an object of JSON schemas"
        )
    return Function(name, {"type": "object", **parameters}, bool(strict))


def _choice(choice: object, functions: Mapping[str, Function]) -> tuple[tuple[Function, ...], bool]:
    """The functions that may be called, and whether one must be."""
    if choice is None or choice == "auto":
        return tuple(functions.values()), False
    if choice == "required":
        return tuple(functions.values()), True
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return (_named(choice, functions, "tool_choice"),), True
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        if not isinstance(allowed, Mapping):
            raise RequestError("tool_choice.allowed_tools: expected an object with mode and tools")
        mode, named = allowed.get("mode"), allowed.get("tools")
        if mode not in ("auto", "required"):
            raise RequestError(
                f"tool_choice.allowed_tools.mode = {mode!r}: expected 'auto' or 'required'"
            )
        if not isinstance(named, list | tuple) or not named:
            raise RequestError("tool_choice.allowed_tools.tools: expected a list of functions")
        chosen = {
            (function := _named(entry, functions, f"tool_choice.allowed_tools.tools[{i}]")).name: (
                function
            )
            for i, entry in enumerate(named)
        }
        return tuple(chosen.values()), mode == "required"
    raise RequestError(
        f"tool_choice = {choice!r}: expected 'none', 'auto', 'required', "
        '{"type": "function", "function": {"name": ..}} or {"type": "allowed_tools", ..}'
    )


def _named(choice: object, functions: Mapping[str, Function], where: str) -> Function:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(f"{where}.function.name is missing: expected the name of a tool")
    if name not in functions:
        raise RequestError(
            f"{where}.function.name = {name!r}: no such tool; there are {', '.join(functions)}"
        )
    return functions[name]
