"""The error envelope `{"error": {"message", "type", "param", "code"}}`, Anthropic's below its own path, and the errors
that only HTTP knows.

Messages never contain what the client sent.
"""

from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tucka_runtime.errors import InvalidRequestError, OverloadedError, TuckaError
from tucka_runtime.server.http.answers import JSONAnswer

RETRY_AFTER_SECONDS = {429: 1, 503: 5}
_ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class UnauthorizedError(TuckaError):
    """The request has no API key, or an unknown one."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class ForbiddenError(TuckaError):
    """The key is valid but may not manage adapters."""

    status = 403
    type = "invalid_request_error"
    code = "admin_key_required"


class RoleRequiredError(ForbiddenError):
    """The key is valid but has not the role that the route asks for."""

    code = "role_required"


class ForbiddenNameError(ForbiddenError):
    """The key manages adapters, but not under this name."""

    code = "name_not_allowed"


class RateLimitError(TuckaError):
    """One of the key's own limits is reached; `retry_after` in seconds, where somebody knows."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, param: str | None = None, retry_after: int | None = None):
        super().__init__(message, param)
        self.retry_after = retry_after


class NotFoundError(TuckaError):
    """There is no such route or object."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class MethodNotAllowedError(TuckaError):
    """The route exists, but not for this method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeoutError(TuckaError):
    """The client took too long to send its request."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class BodyTooLargeError(InvalidRequestError):
    """The body exceeds --max-body-bytes."""

    status = 413
    code = "request_too_large"


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body is compressed."""

    status = 415
    code = "unsupported_media_type"


class HeadersTooLargeError(InvalidRequestError):
    """Too many headers, or too long ones."""

    status = 431
    code = "headers_too_large"


class UnsupportedCodingError(InvalidRequestError):
    """The body has a transfer coding other than `chunked`."""

    status = 501
    code = "unsupported_transfer_coding"


class UnsupportedVersionError(InvalidRequestError):
    """The request is of another HTTP than 1.x."""

    status = 505
    code = "unsupported_http_version"


def envelope(error: TuckaError) -> dict[str, Any]:
    return {"error": {"message": _sentence(error), "type": error.type, "param": error.param, "code": error.code}}


def anthropic_envelope(error: TuckaError, request_id: str) -> dict[str, Any]:
    """The same in the shape of Anthropic's API, whose types are those of its status codes."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": _sentence(error)}, "request_id": request_id}


def speaks_anthropic(path: str) -> bool:
    """Whether the doors at this path are those of Anthropic's API, whether they exist or not."""
    return path == _ANTHROPIC_PATH or path.startswith(_ANTHROPIC_PATH + "/")


def _sentence(error: TuckaError) -> str:
    """Sentences begin with a capital here; in the log and after a command's name they go on as they are."""
    return error.message[:1].upper() + error.message[1:]


def reason(error: BaseException) -> str:
    """What log and metrics call an error: its code, or its type where it has none."""
    return (error.code or error.type) if isinstance(error, TuckaError) else TuckaError.type


def internal_error(request_id: str) -> TuckaError:
    """What a client learns of an exception that nobody expected: nothing but where to look."""
    return TuckaError(f"Something went wrong inside the server. The log has the details under request id {request_id}.")


def crowded() -> OverloadedError:
    """What those are told for whom there is no connection left."""
    return OverloadedError("The server has too many connections open. Try again later.")


def retry_after(error: TuckaError) -> str | None:
    """The header `Retry-After` of an error's answer, if it has one."""
    seconds = error.retry_after or RETRY_AFTER_SECONDS.get(error.status)
    return None if seconds is None else str(seconds)


def error_response(error: TuckaError, headers: dict[str, str] | None = None) -> Response:
    headers = dict(headers or {})
    if (seconds := retry_after(error)) is not None:
        headers["Retry-After"] = seconds
    return _ErrorResponse(error, headers)


class _ErrorResponse(Response):
    """Takes its shape when it learns whose path it answers, and leaves the error's reason in `state.error` for the
    access log."""

    def __init__(self, error: TuckaError, headers: dict[str, str]):
        super().__init__(status_code=error.status)
        self._error, self._added = error, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error, state = self._error, scope["state"]
        state["error"] = reason(error)
        anthropic = speaks_anthropic(scope["path"])
        content = anthropic_envelope(error, state["request_id"]) if anthropic else envelope(error)
        await JSONAnswer(content, error.status, self._added)(scope, receive, send)
