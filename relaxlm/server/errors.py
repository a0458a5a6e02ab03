"""Errors that only HTTP has, and error responses."""

from __future__ import annotations

import json
import math

from starlette.responses import Response

from relaxlm.openai_api.errors import ApiError

_RETRY_AFTER_CLOSING = 5.0


class ClientGone(Exception):
    """The connection has ended; nobody reads a response."""


def error_response(error: ApiError) -> Response:
    """OpenAI's error object, with the headers that belong to its status."""
    headers = {"content-type": "application/json"}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status == 408:
        headers["connection"] = "close"
    # ASCII alone: a message may repeat what a client sent, and that may be no text.
    return Response(json.dumps(error.body()).encode(), error.status, headers)


def shutting_down() -> ApiError:
    return ApiError(
        "the server is shutting down; ask again when it is back",
        503,
        "server_error",
        code="shutting_down",
        retry_after=_RETRY_AFTER_CLOSING,
    )


def out_of_time(seconds: float) -> ApiError:
    return ApiError(
        f"the request took longer than {seconds:g} seconds, the most that this server allows; ask "
        "for less, or start it with a larger --request-timeout",
        504,
        "server_error",
        code="request_timeout",
    )


def not_found(path: str) -> ApiError:
    return ApiError(
        f"there is nothing at {path[:200]!r}; /openapi.json lists what there is",
        404,
        code="unknown_url",
    )


def wrong_method(method: str, allowed: str) -> ApiError:
    return ApiError(
        f"{method[:20]} is not possible here: expected {allowed}", 405, code="method_not_allowed"
    )
