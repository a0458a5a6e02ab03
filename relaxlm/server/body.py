"""A request's body: limited in size and time, and parsed as strictly as JSON is defined."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, NoReturn

from starlette.types import Receive

from relaxlm.openai_api.errors import ApiError
from relaxlm.server.errors import ClientGone

# An escape that may be half of a character; json.loads takes the half alone, and no encoder does.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_HUGE_NUMBER = 400  # digits; no field takes one of a length that float64 can't hold


async def read_body(receive: Receive, headers: dict[str, str], limit: int, seconds: float) -> bytes:
    """The whole body.

    Args:
        headers: the request's, names in lower case.
        limit: bytes; told of a larger one before more than that is kept.
        seconds: for all of it.

    Raises:
        ApiError: 413, 408, 415 (not JSON by its Content-Type, or compressed).
        ClientGone: it ended while the body came.
    """
    _check_type(headers)
    declared = headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
        raise _too_large(limit)
    try:
        return await asyncio.wait_for(_read(receive, limit), seconds)
    except asyncio.TimeoutError:
        raise ApiError(
            f"the request's body did not come within {seconds:g} seconds", 408, code="body_timeout"
        ) from None


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        ApiError: not UTF-8, not JSON (NaN and numbers out of float64's range included), a name
            given twice, nested too deeply, text that is no Unicode, or not an object.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not UTF-8 at byte {error.start}") from None
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
            object_pairs_hook=_each_once,
        )
        if _SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise ApiError(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise ApiError("the body's JSON is nested too deeply") from None
    except UnicodeEncodeError:
        raise ApiError(
            "the body has half of a surrogate pair (\\ud800 to \\udfff), which is no text"
        ) from None
    if not isinstance(value, dict):
        raise ApiError(f"the body is not a JSON object, but {_kind(value)}")
    return value


async def _read(receive: Receive, limit: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return bytes(body)


def _check_type(headers: dict[str, str]) -> None:
    # A form's type is what browsers may send to another site's server without asking it first.
    kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(f"Content-Type is {kind[:80]!r}: expected application/json", 415)
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(
            f"Content-Encoding {coding[:80]!r} is not supported: send the body as it is", 415
        )


def _too_large(limit: int) -> ApiError:
    return ApiError(
        f"the request's body is larger than {limit} bytes", 413, code="request_too_large"
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(f"the body is not JSON: {name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ApiError(f"the body has a number that is too large: {text[:40]}")
    return value


def _bounded(text: str) -> int:
    if len(text) > _HUGE_NUMBER:
        raise ApiError(f"the body has a number of {len(text)} digits")
    return int(text)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ApiError(f"the body gives {twice[:100]!r} twice in one object")
    return value


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
