"""What the API answers. Spelled as OpenAI's replies, with further fields named in each class."""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

FinishReason = Literal["stop", "length", "tool_calls"]


class ReplyModel(BaseModel):
    """Part of a reply. `as_json` is what goes over the wire.

    Fields in `left_out` are not there if they are None; others are null then, as OpenAI has it.
    """

    model_config = ConfigDict(protected_namespaces=())

    left_out: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler):
        # No return type: with one, the JSON schema would be of that type instead of the fields'.
        data = handler(self)
        for name in self.left_out:
            if data.get(name) is None:
                data.pop(name, None)
        return data

    def as_json(self) -> str:
        return self.model_dump_json(by_alias=True)


class Speeds(ReplyModel):
    """An extension. Seconds, and tokens per second; of several prompts, the slowest wait.

    Attributes:
        queue_s: until the first step that took part of the prompt. ttft_s: until the first token.
        end_to_end_latency_s: until the last token.
        prefill_tokens_per_s: of prompt tokens that no cache held.
        decode_tokens_per_s: after the first token, of all replies together.
    """

    queue_s: float
    ttft_s: float
    end_to_end_latency_s: float
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None


class PromptTokensDetails(ReplyModel):
    cached_tokens: int = 0


class CompletionTokensDetails(ReplyModel):
    reasoning_tokens: int = 0


class Usage(ReplyModel):
    """Tokens. The one that ended a reply counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()
    extra: Speeds | None = None

    left_out = ("extra",)


# Chat


class TopLogprob(ReplyModel):
    """`bytes` are exact; `token` has U+FFFD for bytes that are part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(ReplyModel):
    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(ReplyModel):
    name: str
    arguments: str


class ToolCall(ReplyModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(ReplyModel):
    """`reasoning_content` is an extension: what a thinking model wrote before its answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None

    left_out = ("tool_calls", "reasoning_content")


class ChatChoice(ReplyModel):
    """`stop_reason` is an extension: the stop string or token id of the client that was met."""

    index: int
    message: ChatMessage
    finish_reason: FinishReason
    logprobs: ChoiceLogprobs | None = None
    stop_reason: int | str | None = None

    left_out = ("stop_reason",)


class ChatCompletion(ReplyModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    service_tier: Literal["default"] | None = None

    left_out = ("service_tier",)


class FunctionCallDelta(ReplyModel):
    name: str | None = None
    arguments: str | None = None

    left_out = ("name", "arguments")


class ToolCallDelta(ReplyModel):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta

    left_out = ("id", "type")


class ChatDelta(ReplyModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    reasoning_content: str | None = None

    left_out = ("role", "content", "tool_calls", "reasoning_content")


class ChatChunkChoice(ReplyModel):
    index: int
    delta: ChatDelta
    finish_reason: FinishReason | None = None
    logprobs: ChoiceLogprobs | None = None
    stop_reason: int | str | None = None

    left_out = ("stop_reason",)


class ChatCompletionChunk(ReplyModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str
    service_tier: Literal["default"] | None = None

    left_out = ("service_tier",)


# Completions


class CompletionLogprobs(ReplyModel):
    """One entry per token. `text_offset` counts characters from the start of the choice's text.

    A token whose bytes are part of a character is written as "bytes:" and `\\xNN` for each.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(ReplyModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: CompletionLogprobs | None = None
    stop_reason: int | str | None = None

    left_out = ("stop_reason",)


class Completion(ReplyModel):
    """The whole, or a chunk of it: OpenAI gives both the same shape."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str


# Embeddings, models, tokens


class Embedding(ReplyModel):
    """`embedding` is base64 of little-endian float32 if that was asked for."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(ReplyModel):
    prompt_tokens: int
    total_tokens: int


class CreateEmbeddingResponse(ReplyModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(ReplyModel):
    """`max_model_len` is an extension: the most tokens of prompt and reply together."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "relaxlm"
    max_model_len: int


class ModelList(ReplyModel):
    object: Literal["list"] = "list"
    data: list[Model]


class TokenizeResponse(ReplyModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None

    left_out = ("token_strs",)


class DetokenizeResponse(ReplyModel):
    prompt: str


class ErrorDetails(ReplyModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(ReplyModel):
    """What a client gets with a status of 400 and more."""

    error: ErrorDetails
