"""What a client is told when a request cannot be served: one exception, and its body in each API's own form."""

from __future__ import annotations

from typing import Any

__all__ = ["ApiError", "anthropic_body", "body_for", "invalid", "openai_body", "unprocessable"]

# DeepSeek's statuses: 400 format, 401 key, 402 balance (never here), 422 parameters, 429 rate, 500, 503.
_TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("invalid_request_error", "request_too_large"),
    422: ("invalid_request_error", "invalid_parameter"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "unavailable"),
}
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """A request that ends in an error. ``message`` says what to change; ``retry_after`` seconds become the header."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after
        self.code = code or _TYPES.get(status, _TYPES[500])[1]

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request's form or its messages are wrong."""
    return ApiError(400, message, param=param, code=code)


def unprocessable(message: str, param: str | None = None) -> ApiError:
    """422: a parameter has a value outside its range."""
    return ApiError(422, message, param=param)


def openai_body(error: ApiError) -> dict[str, Any]:
    """The body that DeepSeek and OpenAI use."""
    kind = _TYPES.get(error.status, _TYPES[500])[0]
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def anthropic_body(error: ApiError, request_id: str | None = None) -> dict[str, Any]:
    """The body that Anthropic's API uses."""
    kind = _ANTHROPIC.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


def body_for(path: str, error: ApiError, request_id: str | None = None) -> dict[str, Any]:
    """The body for an endpoint: Anthropic's under ``/messages``, else OpenAI's."""
    if "/messages" in path or path.startswith("/anthropic"):
        return anthropic_body(error, request_id)
    return openai_body(error)
