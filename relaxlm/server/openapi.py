"""The OpenAPI document: paths from the routes, schemas from the request and reply types."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from relaxlm.versions import RELAXLM_VERSION

_REF = "#/components/schemas/{model}"
_JSON = "application/json"
_ERROR = "Error"
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERRORS = {
    400: "A field is wrong, unknown or not supported.",
    401: "No API key, or a wrong one.",
    403: "Another site's page, or an unknown name of this server.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not of type application/json.",
    429: "Too many requests wait.",
    503: "The server is shutting down.",
    504: "The request took too long.",
}
_NOT_FOUND = "Another name than the model's, where it matters."


def post(
    summary: str, request: type[BaseModel], reply: type[BaseModel], streams: bool
) -> dict[str, Any]:
    """Arguments for a FastAPI route that reads its body itself."""
    content: dict[str, Any] = {_JSON: {"schema": _ref(reply)}}
    if streams:
        # No schema: what would be one, of the stream or of an event, OpenAPI 3.1 does not say.
        content["text/event-stream"] = {}
    responses = {200: {"description": "The answer.", "content": content}, **_errors(_ERRORS)}
    responses |= _errors({404: _NOT_FOUND})
    body = {"required": True, "content": {_JSON: {"schema": _ref(request)}}}
    return {"summary": summary, "responses": responses, "openapi_extra": {"requestBody": body}}


def get(summary: str, reply: type[BaseModel]) -> dict[str, Any]:
    return _get(summary, {_JSON: {"schema": _ref(reply)}}, {})


def get_named(summary: str, reply: type[BaseModel]) -> dict[str, Any]:
    described = _get(summary, {_JSON: {"schema": _ref(reply)}}, {404: _NOT_FOUND})
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {**described, "openapi_extra": {"parameters": [name]}}


def get_text(summary: str, kind: str) -> dict[str, Any]:
    schema = {"type": "object"} if kind == _JSON else {"type": "string"}
    return _get(summary, {kind: {"schema": schema}}, {503: _ERRORS[503]})


def document(
    app: FastAPI,
    endpoints: Sequence[tuple[type[BaseModel], type[BaseModel]]],
    replies: Sequence[type[BaseModel]],
) -> str:
    """The document as JSON.

    Args:
        endpoints: request and reply of each POST route. replies: of GET routes.
    """
    kinds: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = []
    for request, reply in endpoints:
        kinds += [(request, "validation"), (reply, "serialization")]
    kinds += [(reply, "serialization") for reply in replies]
    _, schemas = models_json_schema(kinds, ref_template=_REF)
    content = app.openapi()
    content["info"]["version"] = RELAXLM_VERSION
    components = content.setdefault("components", {})
    components["schemas"] = {**schemas["$defs"], _ERROR: _ERROR_SCHEMA}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    content["security"] = [{"key": []}, {}]
    return json.dumps(content)


def _get(summary: str, content: dict[str, Any], errors: dict[int, str]) -> dict[str, Any]:
    responses: dict[int, Any] = {200: {"description": "The answer.", "content": content}}
    shared = {status: _ERRORS[status] for status in (401, 403)}
    return {"summary": summary, "responses": {**responses, **_errors({**shared, **errors})}}


def _errors(texts: dict[int, str]) -> dict[int, Any]:
    content = {_JSON: {"schema": {"$ref": _REF.format(model=_ERROR)}}}
    return {
        status: {"description": text, "content": content} for status, text in sorted(texts.items())
    }


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}
