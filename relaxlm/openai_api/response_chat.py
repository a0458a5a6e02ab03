"""A request to /v1/responses as a request to /v1/chat/completions."""

from typing import Any

from relaxlm.openai_api.chat_request import ChatCompletionRequest
from relaxlm.openai_api.errors import ApiError
from relaxlm.openai_api.response_request import (
    ChosenFunction,
    ChosenTools,
    InputCall,
    InputCallOutput,
    InputContent,
    InputMessage,
    InputReasoning,
    ResponseRequest,
    SchemaFormat,
    TextSettings,
)

_SAME = (
    "model",
    "stream",
    "temperature",
    "top_p",
    "top_logprobs",
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
)


def as_chat(request: ResponseRequest) -> ChatCompletionRequest:
    """
    Raises:
        ApiError: items that make no conversation.
    """
    data = request.given(*_SAME)
    data["messages"] = _messages(request)
    if request.max_output_tokens is not None:
        data["max_completion_tokens"] = request.max_output_tokens
    # Either asks for them: `include` for the chosen tokens, `top_logprobs` for others, too.
    if request.include or request.top_logprobs:
        data["logprobs"] = True
    if request.reasoning is not None and request.reasoning.effort is not None:
        data["reasoning_effort"] = request.reasoning.effort
    if request.text is not None:
        data |= _text(request.text)
    if request.tools:
        data["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in request.tools
        ]
        data |= request.given("parallel_tool_calls")
    # Without tools, "auto" means none.
    if request.tool_choice is not None and (request.tools or request.tool_choice != "auto"):
        data["tool_choice"] = _choice(request.tool_choice)
    return ChatCompletionRequest.parse(data)


def _text(settings: TextSettings) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if settings.verbosity is not None:
        data["verbosity"] = settings.verbosity
    if isinstance(settings.format, SchemaFormat):
        schema = settings.format.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        data["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif settings.format is not None:
        data["response_format"] = settings.format.model_dump()
    return data


def _choice(choice: str | ChosenFunction | ChosenTools) -> Any:
    if isinstance(choice, str):
        return choice
    if isinstance(choice, ChosenFunction):
        return _named(choice)
    allowed = {"mode": choice.mode, "tools": [_named(tool) for tool in choice.tools]}
    return {"type": "allowed_tools", "allowed_tools": allowed}


def _named(choice: ChosenFunction) -> dict[str, Any]:
    return {"type": "function", "function": {"name": choice.name}}


def _messages(request: ResponseRequest) -> list[dict[str, Any]]:
    """Neighbouring items of the assistant (reasoning, text, calls) become one message."""
    messages: list[dict[str, Any]] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for item in request.input:
        if isinstance(item, InputMessage):
            if item.role != "assistant":
                messages.append({"role": item.role, "content": _content(item.content)})
                continue
            last = _assistant(messages)
            if "content" in last or "tool_calls" in last:
                last = _begin(messages)
            last["content"] = _joined(item.content)
        elif isinstance(item, InputReasoning):
            last = _begin(messages)
            last["reasoning_content"] = "".join(part.text for part in item.content or ())
        elif isinstance(item, InputCall):
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            _assistant(messages).setdefault("tool_calls", []).append(call)
        else:
            assert isinstance(item, InputCallOutput)
            output = {"role": "tool", "tool_call_id": item.call_id}
            messages.append({**output, "content": _content(item.output)})
    for message in messages:
        if message.keys() <= {"role", "reasoning_content"}:
            raise ApiError("input has reasoning without a reply after it", param="input")
    return messages


def _begin(messages: list[dict[str, Any]]) -> dict[str, Any]:
    messages.append({"role": "assistant"})
    return messages[-1]


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message at the end, a new one if there is none."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[-1]
    return _begin(messages)


def _content(content: InputContent) -> Any:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.text} for part in content]


def _joined(content: InputContent) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
