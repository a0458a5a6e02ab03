"""From a chat request to what the engine is asked: the prompt, the settings, the grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relaxlm.engine.grammar import Grammar, GrammarSpec
from relaxlm.engine.replies import ReplyParser, ToolRequest, tool_request
from relaxlm.engine.types import GenerationRequest
from relaxlm.errors import RequestError, TemplateError
from relaxlm.openai_api.chat_request import (
    AssistantMessage,
    ChatCompletionRequest,
    GrammarFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    Message,
    RegexFormat,
    ResponseFormat,
    Tool,
    ToolMessage,
)
from relaxlm.openai_api.context import ServiceContext
from relaxlm.openai_api.errors import ApiError, api_error
from relaxlm.openai_api.fields import RequestModel
from relaxlm.openai_api.requests import TokenizeRequest

# Names that the prompt's writer sets itself.
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


@dataclass(frozen=True)
class ChatPlan:
    """What a chat request comes to. `new_parser` is called once for each reply."""

    asked: ChatCompletionRequest
    request: GenerationRequest
    new_parser: Callable[[], ReplyParser]


@dataclass(frozen=True)
class ChatPrompt:
    text: str
    ids: list[int]


def plan_chat(context: ServiceContext, asked: ChatCompletionRequest) -> ChatPlan:
    """Slow: renders a template, tokenizes, compiles a grammar.

    Raises:
        RelaxLMError: whatever is wrong with the request.
    """
    tools = _tools(asked)
    prompt = conversation_prompt(context, asked, _variables(context, asked), tools)
    model, replies = context.model, context.replies
    inside = replies.starts_in_reasoning(prompt.text)
    config = asked.sampling(
        max_tokens=asked.max_completion_tokens or asked.max_tokens,
        logprobs=asked.logprobs,
        top_logprobs=asked.top_logprobs or None,
    )
    request = GenerationRequest(
        prompt.ids,
        model.settings(config),
        model.prompts.stop_token_ids,
        model.prompts.stop_strings,
        grammar=_grammar(context, asked, tools, inside),
        continuing=bool(asked.continue_final_message) or model.continues_text,
        shown_special=replies.shown_special(tools),
    )
    return ChatPlan(asked, request, lambda: replies.parser(tools, inside))


def _grammar(
    context: ServiceContext, asked: ChatCompletionRequest, tools: ToolRequest | None, inside: bool
) -> Grammar | None:
    """What makes the reply keep to `response_format` or to what was said of tools, compiled."""
    spec, param = grammar_spec(asked.response_format), "response_format"
    if tools is not None:
        if spec is not None and not tools.required:
            raise ApiError(
                "response_format is not supported beside tools that the model may call or not: "
                'leave one of them out, or set tool_choice to "none" or "required"',
                param="response_format",
            )
        spec, param = context.replies.grammar(tools, inside), "tools"
    elif spec is not None:
        spec = context.replies.after_reasoning(spec, inside)
    if spec is None:
        return None
    try:
        return context.grammars.compile(spec)
    except RequestError as error:
        raise ApiError(str(error), param=param) from error


def grammar_spec(wanted: ResponseFormat | None) -> GrammarSpec | None:
    """What a reply must match; None for any text."""
    if isinstance(wanted, JsonObjectFormat):
        return GrammarSpec("json_object")
    if isinstance(wanted, JsonSchemaFormat):
        return GrammarSpec("json_schema", json.dumps(wanted.json_schema.schema_))
    if isinstance(wanted, RegexFormat):
        return GrammarSpec("regex", wanted.regex)
    if isinstance(wanted, GrammarFormat):
        return GrammarSpec("lark", wanted.grammar)
    return None


def _tools(asked: ChatCompletionRequest) -> ToolRequest | None:
    choice: Any = asked.tool_choice
    if isinstance(choice, RequestModel):
        choice = choice.model_dump(mode="json")
    try:
        return tool_request(dumped_tools(asked.tools), choice, asked.parallel_tool_calls)
    except RequestError as error:
        name = re.match(r"[a-z_]+", str(error))
        raise ApiError(str(error), param=name.group() if name else "tools") from error


def dumped_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """As templates read them."""
    if tools is None:
        return None
    return [tool.model_dump(mode="json", exclude_none=True) for tool in tools]


# The prompt


def conversation_prompt(
    context: ServiceContext,
    asked: ChatCompletionRequest | TokenizeRequest,
    variables: Mapping[str, Any],
    tools: ToolRequest | None,
) -> ChatPrompt:
    """
    Args:
        variables: that the template reads; checked.

    Raises:
        ApiError: a field that the model's template has no use for, or cannot render.
        RequestError: text that is not valid Unicode.
    """
    assert asked.messages is not None
    _check_answers(asked.messages)
    messages = [_plain(message) for message in asked.messages]
    final = bool(asked.continue_final_message)
    generation = not final and asked.add_generation_prompt is not False
    shown = None if tools is None else list(tools.tools)
    prompts = context.model.prompts
    if prompts.source == "none":
        return _without_template(context, asked.messages)

    def render(given: list[dict[str, Any]], shown: Sequence[Any] | None = shown) -> str:
        return prompts.text(given, generation, shown, variables)

    try:
        text = render(messages)
    except TemplateError as error:
        if shown is None:
            raise
        render(messages, None)  # fails as well if it is not for the tools
        raise api_error(error, "tools") from error
    _check_names(messages, text, render)
    encode = context.model.tokenizer.encode
    ids = encode(text, add_special_tokens=False)
    if prompts.source == "conv_template":
        # Its leading tokens are not in the text.
        ids = prompts.encode(messages, generation, shown, variables)
    if final:
        head = ids[: len(ids) - len(encode(text, add_special_tokens=False))]
        text = _cut_after(text, asked.messages[-1])
        ids = [*head, *encode(text, add_special_tokens=False)]
    return ChatPrompt(text, ids)


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates read it."""
    data = message.model_dump(mode="json", exclude_none=True, exclude={"annotations"})
    if isinstance(data.get("content"), list):
        data["content"] = [{"type": "text", "text": part["text"]} for part in data["content"]]
    if isinstance(message, AssistantMessage):
        data.setdefault("content", None)
        for call in data.get("tool_calls", ()):
            call.pop("index", None)
    return data


def _check_answers(messages: Sequence[Message]) -> None:
    """Every tool message answers a call before it; if it names a function, then that call's."""
    called: dict[str, str] = {}
    for i, message in enumerate(messages):
        if isinstance(message, AssistantMessage):
            called |= {call.id: call.function.name for call in message.tool_calls or ()}
        if not isinstance(message, ToolMessage):
            continue
        name = called.get(message.tool_call_id)
        if name is None:
            raise ApiError(
                f"messages[{i}].tool_call_id = {message.tool_call_id!r} answers no call: expected "
                "the id of one in an assistant's message before it",
                param=f"messages[{i}].tool_call_id",
            )
        if message.name not in (None, name):
            raise ApiError(
                f"messages[{i}].name = {message.name!r}, but the call {message.tool_call_id!r} is "
                f"of the function {name!r}",
                param=f"messages[{i}].name",
            )


def _check_names(
    messages: list[dict[str, Any]], text: str, render: Callable[[list[dict[str, Any]]], str]
) -> None:
    """Refuse names that change nothing of the prompt, because the template does not read them."""
    named = [message["role"] for message in messages if "name" in message]
    for role in dict.fromkeys(role for role in named if role != "tool"):
        nameless = [
            {key: value for key, value in message.items() if key != "name"}
            if message["role"] == role
            else message
            for message in messages
        ]
        try:
            reads = render(nameless) != text
        except TemplateError:
            reads = True
        if not reads:
            index = next(i for i, m in enumerate(messages) if m["role"] == role and "name" in m)
            raise ApiError(
                f"messages[{index}].name is not supported: this model's chat template has no place "
                f"for names of the role {role!r}; say it in the content",
                param=f"messages[{index}].name",
            )


def _cut_after(text: str, message: Message) -> str:
    """The prompt up to the end of its last message's own text."""
    content = message.content or ""
    if not isinstance(content, str):
        content = "\n".join(part.text for part in content)
    start = text.rfind(content.strip())
    if not content.strip() or start < 0:
        raise ApiError(
            "continue_final_message: the model's chat template does not show the last message as "
            "it is, so it cannot be continued",
            param="continue_final_message",
        )
    # Spaces at its end are kept where the template keeps them.
    kept = content.lstrip() if text.startswith(content.lstrip(), start) else content.strip()
    return text[: start + len(kept)]


def _without_template(context: ServiceContext, messages: Sequence[Message]) -> ChatPrompt:
    content = messages[0].content if len(messages) == 1 else None
    if not isinstance(content, str):
        raise ApiError(
            "this model has no chat template, so it takes one message of text and no conversation; "
            "`relaxlm gen_config --conv-template NAME` sets a template, and /v1/completions needs "
            "none",
            param="messages",
        )
    return ChatPrompt(content, context.model.prompts.encode_text(content))


# Variables of the template


def template_variables(context: ServiceContext, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """`chat_template_kwargs`, all of which the template must read.

    Raises:
        ApiError: names the one that it doesn't.
    """
    variables = dict(given or {})
    for name in variables:
        if name in _RESERVED or not name.isidentifier() or not context.reads(name):
            raise ApiError(
                f"chat_template_kwargs.{name} is not supported: this model's chat template has no "
                "such variable, or a field of the request sets it",
                param=f"chat_template_kwargs.{name}",
            )
    return variables


def _variables(context: ServiceContext, asked: ChatCompletionRequest) -> dict[str, Any]:
    variables = template_variables(context, asked.chat_template_kwargs)
    effort = asked.reasoning_effort
    if effort is not None:
        if context.reads("reasoning_effort"):
            variables["reasoning_effort"] = effort
        elif effort == "none" and context.reads("enable_thinking"):
            variables["enable_thinking"] = False
        else:
            raise ApiError(
                f"reasoning_effort = {effort!r} is not supported: this model's chat template has "
                "no such variable"
                + (', only "none" is possible' if context.reads("enable_thinking") else ""),
                param="reasoning_effort",
            )
    if asked.verbosity is not None:
        if context.reads("verbosity"):
            variables["verbosity"] = asked.verbosity
        elif asked.verbosity != "medium":
            raise ApiError(
                f"verbosity = {asked.verbosity!r} is not supported: this model's chat template has "
                "no such variable; ask for it in a message",
                param="verbosity",
            )
    return variables


def tokenize_prompt(context: ServiceContext, asked: TokenizeRequest) -> ChatPrompt:
    """The prompt that a chat with these messages would have. Raises as `conversation_prompt`."""
    try:
        tools = tool_request(dumped_tools(asked.tools))
    except RequestError as error:
        raise api_error(error, "tools") from error
    variables = template_variables(context, asked.chat_template_kwargs)
    return conversation_prompt(context, asked, variables, tools)
