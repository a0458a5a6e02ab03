import asyncio
import json
from typing import Any

import pytest

from relaxlm.openai_api.errors import ApiError
from relaxlm.server.body import parse_object, read_body
from relaxlm.server.errors import ClientGone


def receiver(*parts: bytes, more: bool = False, pause: float = 0) -> Any:
    """An ASGI `receive` that gives these parts of a body, and then waits or ends."""
    left = list(parts)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause)
        if not left:
            return {"type": "http.disconnect"}
        part = left.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(left) or more}

    return receive


def read(receive: Any, limit: int = 10, seconds: float = 5, **headers: str) -> bytes:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return asyncio.run(read_body(receive, names, limit, seconds))


def test_a_body_may_come_in_parts() -> None:
    assert read(receiver(b"12345", b"", b"67890")) == b"1234567890"


def test_a_larger_body_is_refused_by_its_declared_length_before_it_is_read() -> None:
    for length in ("11", "1" * 30):
        with pytest.raises(ApiError, match="larger than 10 bytes") as caught:
            read(receiver(pause=60), content_length=length)
        assert caught.value.status == 413


def test_a_larger_body_without_a_declared_length_is_refused_while_it_is_read() -> None:
    with pytest.raises(ApiError, match="larger than 10 bytes") as caught:
        read(receiver(*[b"123"] * 4, more=True))
    assert caught.value.status == 413


def test_a_slow_body_is_given_up() -> None:
    with pytest.raises(ApiError, match=r"within 0\.05 seconds") as caught:
        read(receiver(b"1", pause=60), seconds=0.05)
    assert caught.value.status == 408


def test_a_client_that_leaves_is_no_error_response() -> None:
    with pytest.raises(ClientGone):
        read(receiver(b"1", more=True))


@pytest.mark.parametrize(
    "headers",
    [
        {"content_type": "text/plain"},
        {"content_type": "application/x-www-form-urlencoded"},
        {"content_encoding": "gzip"},
    ],
)
def test_another_type_or_coding_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(ApiError, match=r"expected application/json|not supported") as caught:
        read(receiver(b"{}"), **headers)
    assert caught.value.status == 415


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_is_taken_with_and_without_parameters(kind: str) -> None:
    assert read(receiver(b"{}"), content_type=kind) == b"{}"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a": 1} x', "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1e999}', "too large: 1e999"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (rb'{"a": "\ud83d"}', "surrogate"),
        (rb'{"\udc00": 1}', "surrogate"),
        (b"[]", "an array"),
        (b'"text"', "a string"),
        (b"null", "null"),
        (b"true", "true or false"),
        (b"3", "a number"),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes, problem: str) -> None:
    with pytest.raises(ApiError, match=problem) as caught:
        parse_object(body)
    assert caught.value.status == 400
    json.dumps(caught.value.body()).encode()


def test_json_is_read_as_it_is_meant() -> None:
    body = rb'{"a": [1, -2.5e3, true, null, "\ud83d\ude42 \\ud800"], "big": 123456789012345678901}'
    assert parse_object(body) == {
        "a": [1, -2500.0, True, None, "🙂 \\ud800"],
        "big": 123456789012345678901,
    }
