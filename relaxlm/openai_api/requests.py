"""The requests of /v1/completions, /v1/embeddings, /tokenize and /detokenize."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue, model_validator
from typing_extensions import Self

from relaxlm.openai_api.chat_request import MAX_TOOLS, Message, Tool, check_stream_options
from relaxlm.openai_api.fields import RequestModel, wrong_value
from relaxlm.openai_api.sampling_fields import (
    NO_EFFECT,
    OTHER_SERVERS,
    SamplingFields,
    StreamOptions,
)
from relaxlm.runtime.generation import TokenId

# As OpenAI documents them.
DEFAULT_MAX_TOKENS = 16
MAX_LOGPROBS = 5
MAX_INPUTS = 2048

TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompts = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS)]
)


class CompletionRequest(SamplingFields):
    """What a client asks of /v1/completions."""

    prompt: Prompts
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    refused: ClassVar[Mapping[str, str]] = {
        **OTHER_SERVERS,
        "suffix": "this model writes what follows a prompt, and not what stands between two texts",
    }
    without_effect: ClassVar[Mapping[str, str]] = {"user": NO_EFFECT["user"]}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_stream_options(self.stream, self.stream_options)
        n = self.n or 1
        if self.best_of is not None and self.best_of != n:
            raise wrong_value(
                f"= {self.best_of} with n = {n} is not supported: every reply that is computed is "
                "returned, so expected the same number or nothing",
                "best_of",
            )
        if self.max_tokens == 0 and not self.echo:
            raise wrong_value("= 0 is only possible with echo = true", "max_tokens")
        return self


class EmbeddingRequest(RequestModel):
    """What a client asks of /v1/embeddings.

    Beyond OpenAI's API: `prompt_name` chooses what is put in front of texts, as in
    sentence-transformers; `truncate` cuts off the end of texts that are too long, as in Hugging
    Face's text-embeddings-inference. Token ids are taken as they are.
    """

    input: Prompts
    model: str | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    prompt_name: str | None = None
    truncate: bool | None = None
    user: str | None = None

    without_effect: ClassVar[Mapping[str, str]] = {"user": NO_EFFECT["user"]}


class TokenizeRequest(RequestModel):
    """A text, or messages as a chat would have them, to be cut into tokens."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise wrong_value("or messages is required, and not both", "prompt")
        chat = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
        for name in self.given(*chat) if self.messages is None else ():
            raise wrong_value("is only possible with messages", name)
        if self.messages is not None and self.add_special_tokens is not None:
            raise wrong_value(
                "is only possible with prompt: templates add their tokens themselves",
                "add_special_tokens",
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise wrong_value("= true opens a new message: leave it out", "add_generation_prompt")
        return self


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: list[TokenId]
