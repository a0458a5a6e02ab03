"""The request of /v1/chat/completions."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue, model_validator
from typing_extensions import Self

from relaxlm.openai_api.fields import Count, RequestModel, wrong_value
from relaxlm.openai_api.sampling_fields import (
    NO_EFFECT,
    OTHER_SERVERS,
    IdentityFields,
    SamplingFields,
    StreamOptions,
)

MAX_TOOLS = 128

Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Verbosity = Literal["low", "medium", "high"]

_NOT_TEXT = {
    "image_url": "images",
    "input_audio": "audio",
    "file": "files",
    "refusal": "refusals",
    "input_image": "images",
    "input_file": "files",
    "video_url": "videos",
    "audio_url": "audio",
}


class CacheBreakpoint(RequestModel):
    mode: Literal["explicit"]


class TextPart(RequestModel):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: CacheBreakpoint | None = None

    without_effect: ClassVar[Mapping[str, str]] = {
        "prompt_cache_breakpoint": "a hint for the cache, which keeps every page of a prompt"
    }

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind in _NOT_TEXT:
            raise wrong_value(
                f"= {kind!r} is not supported: this model reads no {_NOT_TEXT[kind]}, "
                'expected parts of type "text"',
                "type",
            )
        return data


Content = str | Annotated[list[TextPart], Field(min_length=1)]


class SystemMessage(RequestModel):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(RequestModel):
    role: Literal["user"]
    content: Content
    name: str | None = None


class FunctionCall(RequestModel):
    name: str
    arguments: str


class ToolCall(RequestModel):
    id: str
    type: Literal["function"]
    function: FunctionCall

    # A streamed call has it; clients send the message that they put together.
    index: int | None = None
    without_effect: ClassVar[Mapping[str, str]] = {
        "index": "the place of a streamed call; calls stand in order"
    }


class AssistantMessage(RequestModel):
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    name: str | None = None
    annotations: Annotated[list[JsonValue], Field(max_length=0)] | None = None

    refused: ClassVar[Mapping[str, str]] = {
        "audio": "this model reads no audio",
        "function_call": "use tool_calls",
        "refusal": "this model knows no refusals, send the text as content",
        "reasoning": "use reasoning_content",
    }
    without_effect: ClassVar[Mapping[str, str]] = {
        "annotations": "only an empty list, as replies have it"
    }

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise wrong_value(
                "is missing: an assistant's message has content or tool_calls", "content"
            )
        return self


class ToolMessage(RequestModel):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class FunctionDefinition(RequestModel):
    name: Name
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(RequestModel):
    type: Literal["function"]
    function: FunctionDefinition

    refused: ClassVar[Mapping[str, str]] = {"custom": "only tools of the type function are called"}


class FunctionName(RequestModel):
    name: str


class NamedFunction(RequestModel):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(RequestModel):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolChoice(RequestModel):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = (
    Literal["none", "auto", "required"]
    | Annotated[NamedFunction | AllowedToolChoice, Field(discriminator="type")]
)


class TextFormat(RequestModel):
    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    type: Literal["json_object"]


class JsonSchema(RequestModel):
    name: Name
    schema_: dict[str, JsonValue] = Field(alias="schema")
    strict: bool | None = None

    refused: ClassVar[Mapping[str, str]] = {
        "description": "describe it in a message: the model does not see the schema"
    }


class JsonSchemaFormat(RequestModel):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(RequestModel):
    type: Literal["regex"]
    regex: Annotated[str, Field(min_length=1)]


class GrammarFormat(RequestModel):
    """`grammar` is written in llguidance's variant of Lark."""

    type: Literal["grammar"]
    grammar: Annotated[str, Field(min_length=1)]


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat,
    Field(discriminator="type"),
]


class CacheOptions(RequestModel):
    mode: Literal["implicit"] | None = None
    ttl: Literal["30m"] | None = None

    without_effect: ClassVar[Mapping[str, str]] = {
        "mode": 'only "implicit": every prompt is looked up in the cache and kept in it',
        "ttl": "prefixes stay cached while there is room",
    }


class ChatCompletionRequest(SamplingFields, IdentityFields):
    """What a client asks of /v1/chat/completions.

    `model` None stands for the one that is loaded. Of `max_tokens` and `max_completion_tokens` one
    is given, or both alike.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    verbosity: Verbosity | None = None
    modalities: list[Literal["text"]] | None = None
    prompt_cache_options: CacheOptions | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    refused: ClassVar[Mapping[str, str]] = {
        **OTHER_SERVERS,
        "audio": "this model writes text only",
        "function_call": "use tool_choice",
        "functions": "use tools",
        "moderation": "nothing moderates here",
        "prediction": "replies are not predicted; start the server with --speculative ngram, which "
        "predicts from the prompt",
        "web_search_options": "nothing is read from the web",
    }
    without_effect: ClassVar[Mapping[str, str]] = {
        **NO_EFFECT,
        "modalities": 'only ["text"]',
        "prompt_cache_options": "how to cache prompts, which changes no answer",
    }

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_stream_options(self.stream, self.stream_options)
        if self.top_logprobs and not self.logprobs:
            raise wrong_value(f"= {self.top_logprobs} needs logprobs = true", "top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise wrong_value(
                f"= {both[1]} and max_tokens = {both[0]} are two names of one limit: give one",
                "max_completion_tokens",
            )
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise wrong_value(
                    "= true opens a new message: leave it out", "add_generation_prompt"
                )
            if self.messages[-1].role != "assistant":
                raise wrong_value(
                    f"= true, but the last message is of the role {self.messages[-1].role!r}: "
                    "expected one of the assistant",
                    "continue_final_message",
                )
        return self


def check_stream_options(stream: bool | None, options: StreamOptions | None) -> None:
    """Refuse options of a stream that was not asked for."""
    if options is not None and not stream:
        raise wrong_value("is only possible with stream = true", "stream_options")
