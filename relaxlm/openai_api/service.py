"""The API of one engine, without HTTP."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from relaxlm.engine.types import Update
from relaxlm.openai_api.chat import chat
from relaxlm.openai_api.chat_request import ChatCompletionRequest
from relaxlm.openai_api.completions import complete
from relaxlm.openai_api.context import ServiceContext
from relaxlm.openai_api.embeddings import embed
from relaxlm.openai_api.errors import ApiError, api_error
from relaxlm.openai_api.fields import RequestModel
from relaxlm.openai_api.replies import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CreateEmbeddingResponse,
    DetokenizeResponse,
    Model,
    ModelList,
    TokenizeResponse,
)
from relaxlm.openai_api.requests import (
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from relaxlm.openai_api.response_replies import Response, ResponseEvent
from relaxlm.openai_api.response_request import ResponseRequest
from relaxlm.openai_api.responses import respond
from relaxlm.openai_api.stream import ReplyStream
from relaxlm.openai_api.tokens import detokenize, tokenize

if TYPE_CHECKING:
    from relaxlm.engine.loop import EngineLoop

Result = TypeVar("Result")


class ApiService:
    """Answers requests. Coroutines may run on several event loops, each request on one.

    All of them raise `ApiError`. With `stream` they return a `ReplyStream`, and the request is in
    the engine by then. A cancelled task or a closed stream ends its request in the engine.
    """

    def __init__(
        self,
        engine: EngineLoop,
        name: str | None = None,
        strict_model_name: bool = False,
        on_update: Callable[[Update], None] | None = None,
    ) -> None:
        """
        Args:
            name: what the model is called; its folder's name if None.
            strict_model_name: refuse requests for another model, instead of serving this one.
            on_update: is told of every update of the engine, on its output thread; must be quick.
        """
        self.context = ServiceContext(engine, name, strict_model_name, on_update)

    def close(self) -> None:
        """End the threads that prepare requests; the engine is its owner's."""
        self.context.close()

    async def chat(
        self, request: ChatCompletionRequest
    ) -> ChatCompletion | ReplyStream[ChatCompletionChunk]:
        return await _told(request, "messages", chat(self.context, request))

    async def complete(self, request: CompletionRequest) -> Completion | ReplyStream[Completion]:
        return await _told(request, "prompt", complete(self.context, request))

    async def respond(self, request: ResponseRequest) -> Response | ReplyStream[ResponseEvent]:
        return await _told(request, "input", respond(self.context, request))

    async def embed(self, request: EmbeddingRequest) -> CreateEmbeddingResponse:
        return await _told(request, "input", embed(self.context, request))

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        param = "prompt" if request.messages is None else "messages"
        return await _told(request, param, tokenize(self.context, request))

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeResponse:
        return await _told(request, "tokens", detokenize(self.context, request))

    def models(self) -> ModelList:
        return ModelList(data=[self._model()])

    def model(self, name: str) -> Model:
        """
        Raises:
            ApiError: 404 for any other name than the model's.
        """
        if name != self.context.name:
            raise ApiError(
                f"model {name!r} is not here: this server has {self.context.name!r}",
                404,
                param="model",
                code="model_not_found",
            )
        return self._model()

    def _model(self) -> Model:
        context = self.context
        return Model(
            id=context.name,
            created=context.created,
            max_model_len=context.engine.context_window_size,
        )


async def _told(request: RequestModel, param: str, answer: Awaitable[Result]) -> Result:
    """The answer; whatever goes wrong becomes an `ApiError`.

    Its `param` is the field of the request with which the message begins, or else `param`.
    """
    try:
        return await answer
    except Exception as error:
        name = re.match("[a-z_]*", str(error))
        if name and name.group() in type(request).model_fields:
            param = name.group()
        raise api_error(error, param) from error
