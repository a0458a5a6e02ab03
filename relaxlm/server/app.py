"""The routes, and how a request becomes a response."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from relaxlm.openai_api.chat_request import ChatCompletionRequest
from relaxlm.openai_api.errors import ApiError, api_error
from relaxlm.openai_api.fields import RequestModel
from relaxlm.openai_api.replies import (
    ChatCompletion,
    Completion,
    CreateEmbeddingResponse,
    DetokenizeResponse,
    Model,
    ModelList,
    ReplyModel,
    TokenizeResponse,
)
from relaxlm.openai_api.requests import (
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from relaxlm.openai_api.response_replies import Response as TextResponse
from relaxlm.openai_api.response_request import ResponseRequest
from relaxlm.openai_api.service import ApiService
from relaxlm.openai_api.stream import ReplyStream
from relaxlm.server import openapi
from relaxlm.server.body import parse_object, read_body
from relaxlm.server.errors import (
    ClientGone,
    error_response,
    not_found,
    shutting_down,
    wrong_method,
)
from relaxlm.server.events import EventStream
from relaxlm.server.guard import Access, Guard
from relaxlm.server.metrics import CONTENT_TYPE, Metrics
from relaxlm.server.pages import OPEN_PATHS, add_pages
from relaxlm.server.settings import ServerSettings
from relaxlm.server.watch import Deadline, Lifetime, watched

if TYPE_CHECKING:
    from relaxlm.engine.loop import EngineLoop

_JSON = "application/json"
_CLIENT_GONE = 499  # as nginx logs it; nobody receives it

_log = logging.getLogger("relaxlm.server")

Reply = ReplyModel | ReplyStream[Any]


@dataclass(frozen=True)
class _Endpoint:
    """A POST route.

    Attributes:
        limit_fields: the request's fields that limit the length of a reply.
        streams: whether a request may ask for a stream.
        named_events: as its streams have them.
    """

    path: str
    request: type[RequestModel]
    reply: type[ReplyModel]
    serve: Callable[[Any], Awaitable[Reply]]
    summary: str
    limit_fields: tuple[str, ...] = ()
    streams: bool = False
    named_events: bool = False


class ApiServer:
    """What is served for one engine.

    Attributes:
        app: the ASGI application.
        lifetime: of the server; `run.py` ends it.
    """

    def __init__(self, engine: EngineLoop, settings: ServerSettings) -> None:
        self.settings, self.engine = settings, engine
        self.lifetime = Lifetime()
        self.metrics = Metrics(engine.stats)
        self.service = ApiService(
            engine,
            name=settings.model_name,
            strict_model_name=settings.strict_model_name,
            on_update=self.metrics.updated,
        )
        # No pages of FastAPI's own: they load scripts from elsewhere.
        self.app = FastAPI(
            title="relaxlm",
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            redirect_slashes=False,
        )
        self._add_middleware()
        self._add_routes()

    def close(self) -> None:
        """End the services' threads; not the engine."""
        self.service.close()

    def _add_middleware(self) -> None:
        """From the innermost to the outermost."""
        app, settings = self.app, self.settings
        app.add_middleware(
            Access, settings=settings, metrics=self.metrics, open_paths=OPEN_PATHS | {"/health"}
        )
        if settings.cors_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        app.add_middleware(Guard, settings=settings, metrics=self.metrics)
        app.add_exception_handler(HTTPException, self._routing_error)

    def _add_routes(self) -> None:
        service, app = self.service, self.app
        endpoints = (
            _Endpoint(
                "/v1/chat/completions",
                ChatCompletionRequest,
                ChatCompletion,
                service.chat,
                "Answer a conversation.",
                ("max_tokens", "max_completion_tokens"),
                streams=True,
            ),
            _Endpoint(
                "/v1/completions",
                CompletionRequest,
                Completion,
                service.complete,
                "Continue texts.",
                ("max_tokens",),
                streams=True,
            ),
            _Endpoint(
                "/v1/responses",
                ResponseRequest,
                TextResponse,
                service.respond,
                "Answer, in the shape of the Responses API. Nothing is stored.",
                ("max_output_tokens",),
                streams=True,
                named_events=True,
            ),
            _Endpoint(
                "/v1/embeddings",
                EmbeddingRequest,
                CreateEmbeddingResponse,
                service.embed,
                "A vector for each text.",
            ),
            _Endpoint(
                "/tokenize",
                TokenizeRequest,
                TokenizeResponse,
                service.tokenize,
                "The tokens of a text or a conversation.",
            ),
            _Endpoint(
                "/detokenize",
                DetokenizeRequest,
                DetokenizeResponse,
                service.detokenize,
                "The text of tokens.",
            ),
        )
        for endpoint in endpoints:
            app.add_api_route(
                endpoint.path,
                self._handler(endpoint),
                methods=["POST"],
                response_model=None,
                **openapi.post(
                    endpoint.summary, endpoint.request, endpoint.reply, endpoint.streams
                ),
            )
        getters: tuple[tuple[str, Callable[[Request], Response], dict[str, Any]], ...] = (
            ("/v1/models", self._models, openapi.get("The model.", ModelList)),
            ("/v1/models/{name:path}", self._model, openapi.get_named("The model.", Model)),
            ("/health", self._health, openapi.get_text("Whether requests are taken.", _JSON)),
            ("/metrics", self._metrics_text, openapi.get_text("For Prometheus.", "text/plain")),
            ("/openapi.json", self._document, openapi.get_text("This document.", _JSON)),
        )
        for path, function, described in getters:
            handler = self._getter(function)
            app.add_api_route(path, handler, methods=["GET"], response_model=None, **described)
            app.add_route(path, handler, methods=["HEAD"], include_in_schema=False)
        add_pages(app)
        self._openapi = openapi.document(
            app, [(one.request, one.reply) for one in endpoints], [ModelList, Model]
        )

    def _handler(self, endpoint: _Endpoint) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            try:
                return await self._answer(endpoint, request)
            except ClientGone:
                return _Nothing(self.metrics)
            except Exception as error:
                return self._failure(error)

        return handle

    async def _answer(self, endpoint: _Endpoint, request: Request) -> Response:
        settings = self.settings
        deadline = Deadline(settings.request_timeout)
        if self.lifetime.closing:
            raise shutting_down()
        for name in request.query_params:
            raise ApiError(f"{name[:100]!r} is not a query parameter of {endpoint.path}")
        body = await read_body(
            request.receive, dict(request.headers), settings.max_body, settings.body_timeout
        )
        data = parse_object(body)
        self._limit_length(data, endpoint.limit_fields)
        reply = await watched(_served(endpoint, data), request.receive, deadline, self.lifetime)
        if not isinstance(reply, ReplyStream):
            return Response(reply.as_json(), media_type=_JSON)
        return EventStream(
            reply,
            self.lifetime,
            deadline,
            named=endpoint.named_events,
            keep_alive=settings.keep_alive,
            failed=self._note,
        )

    def _limit_length(self, data: dict[str, Any], fields: tuple[str, ...]) -> None:
        limit = self.settings.max_tokens_limit
        if limit is None or not fields:
            return
        given = [name for name in fields if data.get(name) is not None]
        for name in given:
            if isinstance(data[name], int) and data[name] > limit:
                raise ApiError(
                    f"{name} = {data[name]} is more than this server allows: {limit}", param=name
                )
        if not given:
            data[fields[0]] = limit

    def _failure(self, error: Exception) -> Response:
        told = api_error(error)
        if told is not error:
            told.__cause__ = error
        self._note(told)
        return error_response(told)

    def _note(self, error: ApiError) -> None:
        """Count an error, and log it where a client is not told what it is."""
        self.metrics.failed(error)
        if error.code == "internal_error":
            _log.error("a request failed", exc_info=error.__cause__ or error)

    async def _routing_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            told = wrong_method(request.method, allowed)
        else:
            told = not_found(request.url.path)
        response = error_response(told)
        response.headers.update(error.headers or {})
        self.metrics.failed(told)
        return response

    def _getter(
        self, function: Callable[[Request], Response]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            try:
                return function(request)
            except Exception as error:
                return self._failure(error)

        return handle

    def _models(self, request: Request) -> Response:
        return Response(self.service.models().as_json(), media_type=_JSON)

    def _model(self, request: Request) -> Response:
        return Response(self.service.model(request.path_params["name"]).as_json(), media_type=_JSON)

    def _health(self, request: Request) -> Response:
        if self.lifetime.closing:
            raise shutting_down()
        if self.engine.failure is not None:
            raise api_error(self.engine.failure)
        return Response('{"status":"ok"}', media_type=_JSON)

    def _metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    def _document(self, request: Request) -> Response:
        return Response(self._openapi, media_type=_JSON)


async def _served(endpoint: _Endpoint, data: dict[str, Any]) -> Reply:
    return await endpoint.serve(endpoint.request.parse(data))


class _Nothing(Response):
    """For a client that is gone."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.responded(scope, _CLIENT_GONE)
