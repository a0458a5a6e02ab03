"""The request of /v1/responses: text in, text and function calls out."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator
from typing_extensions import Self

from relaxlm.openai_api.chat_request import (
    MAX_TOOLS,
    CacheBreakpoint,
    CacheOptions,
    GrammarFormat,
    JsonObjectFormat,
    Name,
    ReasoningEffort,
    RegexFormat,
    TextFormat,
    Verbosity,
)
from relaxlm.openai_api.fields import Count, RequestModel, wrong_value
from relaxlm.openai_api.sampling_fields import NO_EFFECT, IdentityFields
from relaxlm.runtime.generation import Probability

_OTHER_PARTS = {
    "input_image": "images",
    "input_file": "files",
    "input_audio": "audio",
    "refusal": "refusals",
}
_STATUS = "what became of an item before; items stand as they are"


class InputText(RequestModel):
    type: Literal["input_text", "output_text", "text"]
    text: str
    prompt_cache_breakpoint: CacheBreakpoint | None = None
    annotations: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    logprobs: list[JsonValue] | None = None

    without_effect: ClassVar[Mapping[str, str]] = {
        "prompt_cache_breakpoint": "a hint for the cache, which keeps every page of a prompt",
        "annotations": "only an empty list, as replies have it",
        "logprobs": "of a reply that is sent back; they are no part of its text",
    }

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind in _OTHER_PARTS:
            raise wrong_value(
                f"= {kind!r} is not supported: this model reads no {_OTHER_PARTS[kind]}", "type"
            )
        return data


InputContent = str | Annotated[list[InputText], Field(min_length=1)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputMessage(RequestModel):
    """A message of any role, with or without `type`; or one of a reply, sent back."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: InputContent
    id: str | None = None
    status: ItemStatus | None = None
    phase: Literal["final_answer"] | None = None

    refused: ClassVar[Mapping[str, str]] = {"name": "this request has no names of speakers"}
    without_effect: ClassVar[Mapping[str, str]] = {
        "id": "nothing is stored under it",
        "status": _STATUS,
        "phase": 'only "final_answer": models here write no other messages',
    }


class InputCall(RequestModel):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: ItemStatus | None = None

    refused: ClassVar[Mapping[str, str]] = {
        "async": "calls are answered in order",
        "caller": "only the model calls functions",
        "namespace": "functions have no namespaces",
    }
    without_effect: ClassVar[Mapping[str, str]] = {
        "id": "nothing is stored under it",
        "status": _STATUS,
    }


class InputCallOutput(RequestModel):
    type: Literal["function_call_output"]
    call_id: str
    output: InputContent
    id: str | None = None
    status: ItemStatus | None = None

    refused: ClassVar[Mapping[str, str]] = {
        "caller": "only the model calls functions",
        "namespace": "functions have no namespaces",
        "name": "call_id says which call is answered",
    }
    without_effect: ClassVar[Mapping[str, str]] = {
        "id": "nothing is stored under it",
        "status": _STATUS,
    }


class ReasoningText(RequestModel):
    type: Literal["reasoning_text"]
    text: str


class InputReasoning(RequestModel):
    """What a thinking model wrote before its answer, sent back; templates decide what stays."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    content: list[ReasoningText] | None = None
    status: ItemStatus | None = None

    refused: ClassVar[Mapping[str, str]] = {
        "encrypted_content": "reasoning is not encrypted here: send it as content"
    }
    without_effect: ClassVar[Mapping[str, str]] = {
        "id": "nothing is stored under it",
        "summary": "only an empty list: nothing is summarized",
        "status": _STATUS,
    }


def _kind_of_item(item: Any) -> Any:
    """Messages may come without a type."""
    if isinstance(item, RequestModel):
        return getattr(item, "type", None) or "message"
    if isinstance(item, dict):
        return item.get("type") or ("message" if "role" in item else None)
    return None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_kind_of_item),
]


class FunctionTool(RequestModel):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None

    refused: ClassVar[Mapping[str, str]] = {
        "async": "calls are answered in order",
        "allowed_callers": "only the model calls functions",
        "defer_loading": "all tools are shown to the model",
        "output_schema": "what a function returns is not checked",
    }


class ChosenFunction(RequestModel):
    type: Literal["function"]
    name: str


class ChosenTools(RequestModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenFunction], Field(min_length=1, max_length=MAX_TOOLS)]


class SchemaFormat(RequestModel):
    type: Literal["json_schema"]
    name: Name
    schema_: dict[str, JsonValue] = Field(alias="schema")
    strict: bool | None = None

    refused: ClassVar[Mapping[str, str]] = {
        "description": "describe it in a message: the model does not see the schema"
    }


class TextSettings(RequestModel):
    format: (
        Annotated[
            TextFormat | JsonObjectFormat | SchemaFormat | RegexFormat | GrammarFormat,
            Field(discriminator="type"),
        ]
        | None
    ) = None
    verbosity: Verbosity | None = None


class Reasoning(RequestModel):
    effort: ReasoningEffort | None = None

    refused: ClassVar[Mapping[str, str]] = {
        "summary": "nothing is summarized: the reasoning itself is in the reply",
        "generate_summary": "nothing is summarized: the reasoning itself is in the reply",
        "context": "the model's template decides which reasoning stays",
        "mode": "there is one way to reason",
    }


class ResponseStreamOptions(RequestModel):
    include_obfuscation: Literal[False] | None = None

    without_effect: ClassVar[Mapping[str, str]] = {
        "include_obfuscation": "only false: events are not padded"
    }


class ResponseCacheOptions(CacheOptions):
    refused: ClassVar[Mapping[str, str]] = {
        "comparison_response_id": "nothing is stored to compare with",
        "prewarm": "prompts are computed when they are answered",
    }


class ResponseRequest(IdentityFields):
    """What a client asks of /v1/responses. Nothing is stored, so `input` is the conversation."""

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Probability | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[ChosenFunction | ChosenTools, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    prompt_cache_options: ResponseCacheOptions | None = None

    refused: ClassVar[Mapping[str, str]] = {
        "access_programs": "there are none",
        "background_options": "responses are not made in the background",
        "context_management": "nothing is compacted: send a shorter input",
        "conversation": "nothing is stored: send the conversation as input",
        "image": "this model reads no images",
        "max_tool_calls": "it counts built-in tools, of which there are none",
        "moderation": "nothing moderates here",
        "previous_response_id": "nothing is stored: send the conversation as input",
        "prompt": "no prompts are stored: send input and instructions",
    }
    without_effect: ClassVar[Mapping[str, str]] = {
        **NO_EFFECT,
        "metadata": "returned with the response",
        "background": "only false: there is nothing to ask for a response later",
        "truncation": 'only "disabled": an input that does not fit is refused',
        "prompt_cache_options": "how to cache prompts, which changes no answer",
    }

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise wrong_value("is only possible with stream = true", "stream_options")
        return self
