"""Errors as the API tells them: an HTTP status and OpenAI's error object."""

from typing import Any

from relaxlm.errors import (
    BusyError,
    ContextOverflowError,
    RelaxLMError,
    RequestError,
    TemplateError,
)


class ApiError(RelaxLMError):
    """What a client is told when its request fails.

    Attributes:
        status: of HTTP: 400, 401, 404, 413, 429, 500 or 503.
        type: "invalid_request_error", "authentication_error", "rate_limit_error" or "server_error".
        param: the field that is wrong, such as "messages[0].content", if it is one.
        code: a short name that programs can compare, if there is one.
        retry_after: seconds after which the same request may pass, if that is known.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.type = message, status, type
        self.param, self.code, self.retry_after = param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON that the client gets."""
        return {"error": self.details()}

    def details(self) -> dict[str, Any]:
        return {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }


def api_error(error: BaseException, param: str | None = None) -> ApiError:
    """What a client is told of an exception.

    What the client can mend is told as it is; so is every error that relaxlm raises on purpose.
    Of others only the type is told: their text may show what is none of the client's business.

    Args:
        param: the field that led to it, if the exception does not say.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        if error.closing:
            return ApiError(str(error), 503, "server_error", None, "shutting_down", _after(error))
        return ApiError(
            str(error), 429, "rate_limit_error", None, "rate_limit_exceeded", _after(error)
        )
    if isinstance(error, ContextOverflowError):
        return ApiError(str(error), param=param, code="context_length_exceeded")
    if isinstance(error, TemplateError):
        return ApiError(str(error), param=param, code="template_error")
    if isinstance(error, RequestError):
        return ApiError(str(error), param=param)
    if isinstance(error, RelaxLMError):
        return ApiError(str(error), 500, "server_error", code="engine_error")
    if isinstance(error, RecursionError):
        return ApiError("the request is nested too deeply: send fewer levels", param=param)
    return ApiError(
        f"an internal error of type {type(error).__name__}; the server's log has the details",
        500,
        "server_error",
        code="internal_error",
    )


def _after(error: BusyError) -> float:
    return error.retry_after
