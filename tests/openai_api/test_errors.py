import pytest

from relaxlm.errors import (
    BusyError,
    ContextOverflowError,
    LibraryError,
    RequestError,
    TemplateError,
)
from relaxlm.openai_api.errors import ApiError, api_error


@pytest.mark.parametrize(
    ("error", "status", "type", "code"),
    [
        (RequestError("x"), 400, "invalid_request_error", None),
        (TemplateError("x"), 400, "invalid_request_error", "template_error"),
        (ContextOverflowError("x"), 400, "invalid_request_error", "context_length_exceeded"),
        (BusyError("x", 3.0), 429, "rate_limit_error", "rate_limit_exceeded"),
        (BusyError("x", closing=True), 503, "server_error", "shutting_down"),
        (LibraryError("x"), 500, "server_error", "engine_error"),
        (RecursionError("x"), 400, "invalid_request_error", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_error_has_a_status(
    error: Exception, status: int, type: str, code: str | None
) -> None:
    found = api_error(error, "messages")
    assert (found.status, found.type, found.code) == (status, type, code)
    assert found.retry_after == getattr(error, "retry_after", None)
    assert found.body()["error"]["message"] == str(found)
    assert api_error(found) is found


def test_what_was_not_expected_does_not_show_its_text() -> None:
    found = api_error(KeyError("/secret/path"))
    assert found.status == 500
    assert "secret" not in str(found)
    assert "KeyError" in str(found)


def test_the_body_is_openais() -> None:
    body = ApiError("no", param="n", code="c").body()
    assert body == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": "c"}
    }
