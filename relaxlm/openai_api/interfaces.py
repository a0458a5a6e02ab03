"""`create` of chat completions and the others: keyword arguments in, typed replies out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, overload

from relaxlm.openai_api.chat_request import ChatCompletionRequest
from relaxlm.openai_api.fields import RequestModel, plain
from relaxlm.openai_api.replies import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CreateEmbeddingResponse,
    Model,
    ModelList,
    ReplyModel,
)
from relaxlm.openai_api.requests import CompletionRequest, EmbeddingRequest
from relaxlm.openai_api.response_replies import Response, ResponseEvent
from relaxlm.openai_api.response_request import ResponseRequest
from relaxlm.openai_api.runner import Runner, Stream
from relaxlm.openai_api.service import ApiService
from relaxlm.openai_api.stream import ReplyStream

Request = TypeVar("Request", bound=RequestModel)
Reply = TypeVar("Reply")
Chunk = TypeVar("Chunk", bound=ReplyModel)

# As JSON has it, or objects of this package: the message of a reply may be sent back.
Json = Mapping[str, Any] | ReplyModel


def parsed(kind: type[Request], fields: dict[str, Any]) -> Request:
    """A request from Python values. Raises as `RequestModel.parse`."""
    return kind.parse(plain(fields))


# Asynchronous


class AsyncChatCompletions:
    def __init__(self, service: ApiService) -> None:
        self._service = service

    @overload
    async def create(
        self, *, messages: Iterable[Json], stream: Literal[True], **fields: Any
    ) -> ReplyStream[ChatCompletionChunk]: ...

    @overload
    async def create(
        self, *, messages: Iterable[Json], stream: Literal[False] | None = None, **fields: Any
    ) -> ChatCompletion: ...

    async def create(self, *, messages: Iterable[Json], **fields: Any) -> Any:
        """Answer a conversation. `fields` are those of the HTTP API.

        Raises:
            ApiError: says what is wrong with which field; or the engine is busy, or has failed.
        """
        data = {"messages": list(messages), **fields}
        return await self._service.chat(parsed(ChatCompletionRequest, data))


class AsyncChat:
    def __init__(self, service: ApiService) -> None:
        self.completions = AsyncChatCompletions(service)


class AsyncCompletions:
    def __init__(self, service: ApiService) -> None:
        self._service = service

    @overload
    async def create(
        self, *, prompt: Any, stream: Literal[True], **fields: Any
    ) -> ReplyStream[Completion]: ...

    @overload
    async def create(
        self, *, prompt: Any, stream: Literal[False] | None = None, **fields: Any
    ) -> Completion: ...

    async def create(self, *, prompt: Any, **fields: Any) -> Any:
        """Continue a text or token ids, or several. Raises as for chat."""
        return await self._service.complete(parsed(CompletionRequest, {"prompt": prompt, **fields}))


class AsyncResponses:
    def __init__(self, service: ApiService) -> None:
        self._service = service

    @overload
    async def create(
        self, *, input: Any, stream: Literal[True], **fields: Any
    ) -> ReplyStream[ResponseEvent]: ...

    @overload
    async def create(
        self, *, input: Any, stream: Literal[False] | None = None, **fields: Any
    ) -> Response: ...

    async def create(self, *, input: Any, **fields: Any) -> Any:
        """Answer a text, or a list of items. Raises as for chat."""
        return await self._service.respond(parsed(ResponseRequest, {"input": input, **fields}))


class AsyncEmbeddings:
    def __init__(self, service: ApiService) -> None:
        self._service = service

    async def create(self, *, input: Any, **fields: Any) -> CreateEmbeddingResponse:
        """Vectors of one text or several. Raises as for chat."""
        return await self._service.embed(parsed(EmbeddingRequest, {"input": input, **fields}))


# Synchronous


class ChatCompletions:
    def __init__(self, service: ApiService, runner: Runner) -> None:
        self._create, self._runner = AsyncChatCompletions(service).create, runner

    @overload
    def create(
        self, *, messages: Iterable[Json], stream: Literal[True], **fields: Any
    ) -> Stream[ChatCompletionChunk]: ...

    @overload
    def create(
        self, *, messages: Iterable[Json], stream: Literal[False] | None = None, **fields: Any
    ) -> ChatCompletion: ...

    def create(self, *, messages: Iterable[Json], **fields: Any) -> Any:
        """Answer a conversation. `fields` are those of the HTTP API.

        Raises:
            ApiError: says what is wrong with which field; or the engine is busy, or has failed.
        """
        return _for_threads(
            self._runner, self._runner.run(self._create(messages=messages, **fields))
        )


class Chat:
    def __init__(self, service: ApiService, runner: Runner) -> None:
        self.completions = ChatCompletions(service, runner)


class Completions:
    def __init__(self, service: ApiService, runner: Runner) -> None:
        self._create, self._runner = AsyncCompletions(service).create, runner

    @overload
    def create(
        self, *, prompt: Any, stream: Literal[True], **fields: Any
    ) -> Stream[Completion]: ...

    @overload
    def create(
        self, *, prompt: Any, stream: Literal[False] | None = None, **fields: Any
    ) -> Completion: ...

    def create(self, *, prompt: Any, **fields: Any) -> Any:
        """Continue a text or token ids, or several. Raises as for chat."""
        return _for_threads(self._runner, self._runner.run(self._create(prompt=prompt, **fields)))


class Responses:
    def __init__(self, service: ApiService, runner: Runner) -> None:
        self._create, self._runner = AsyncResponses(service).create, runner

    @overload
    def create(
        self, *, input: Any, stream: Literal[True], **fields: Any
    ) -> Stream[ResponseEvent]: ...

    @overload
    def create(
        self, *, input: Any, stream: Literal[False] | None = None, **fields: Any
    ) -> Response: ...

    def create(self, *, input: Any, **fields: Any) -> Any:
        """Answer a text, or a list of items. Raises as for chat."""
        return _for_threads(self._runner, self._runner.run(self._create(input=input, **fields)))


class Embeddings:
    def __init__(self, service: ApiService, runner: Runner) -> None:
        self._create, self._runner = AsyncEmbeddings(service).create, runner

    def create(self, *, input: Any, **fields: Any) -> CreateEmbeddingResponse:
        """Vectors of one text or several. Raises as for chat."""
        return self._runner.run(self._create(input=input, **fields))


class Models:
    """What is loaded; for both interfaces, as it takes no time."""

    def __init__(self, service: ApiService) -> None:
        self._service = service

    def list(self) -> ModelList:
        return self._service.models()

    def retrieve(self, model: str) -> Model:
        """
        Raises:
            ApiError: 404 for any other name than the model's.
        """
        return self._service.model(model)


def _for_threads(runner: Runner, reply: Any) -> Any:
    return Stream(reply, runner) if isinstance(reply, ReplyStream) else reply
