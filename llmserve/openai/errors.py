"""The one table from exception classes to what a client sees, and the errors that HTTP adds.

It knows no web framework: batch jobs put the same statuses and bodies into their output files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmserve.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    EngineShutdownError,
    InvalidRequestError,
    RequestTimeoutError,
)
from llmserve.openai.responses import ErrorDetail, ErrorResponse

_RETRY_AFTER_S = 5.0  # an engine process is back, and a server replaced, within seconds


class MalformedBodyError(InvalidRequestError):
    """The body is no JSON, or not of the type that its header says."""


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body is not sent as JSON."""


class BodyTooLargeError(InvalidRequestError):
    """The body is larger than the server reads."""


class AuthenticationError(InvalidRequestError):
    """No API key, or none that this server knows."""


class ModelNotFoundError(InvalidRequestError):
    """The model asked for is not the one that is served."""


class RouteNotFoundError(InvalidRequestError):
    """There is no such path."""


class MethodNotAllowedError(InvalidRequestError):
    """The path does not know this method."""


class EngineLoadingError(EngineError):
    """The model is still being loaded."""


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How a class of errors is told to clients.

    Attributes:
        status: HTTP status.
        type: OpenAI's ``error.type``.
        code: ``error.code`` where the exception brings none.
        retry: Whether trying again makes sense: then there is a Retry-After header.
    """

    status: int
    type: str
    code: str | None = None
    retry: bool = False


_BAD_REQUEST = "invalid_request_error"
_UNAVAILABLE = "service_unavailable_error"

ERROR_KINDS: dict[type[Exception], ErrorKind] = {
    InvalidRequestError: ErrorKind(400, _BAD_REQUEST, "invalid_value"),
    ContextLengthError: ErrorKind(400, _BAD_REQUEST, "context_length_exceeded"),
    MalformedBodyError: ErrorKind(400, _BAD_REQUEST, "malformed_body"),
    AuthenticationError: ErrorKind(401, "authentication_error", "invalid_api_key"),
    ModelNotFoundError: ErrorKind(404, _BAD_REQUEST, "model_not_found"),
    RouteNotFoundError: ErrorKind(404, _BAD_REQUEST, "route_not_found"),
    MethodNotAllowedError: ErrorKind(405, _BAD_REQUEST, "method_not_allowed"),
    RequestTimeoutError: ErrorKind(408, "timeout_error", "timeout"),
    BodyTooLargeError: ErrorKind(413, _BAD_REQUEST, "body_too_large"),
    UnsupportedMediaTypeError: ErrorKind(415, _BAD_REQUEST, "unsupported_media_type"),
    EngineError: ErrorKind(500, "server_error", "engine_error"),
    EngineOverloadedError: ErrorKind(503, _UNAVAILABLE, "engine_overloaded", retry=True),
    EngineLoadingError: ErrorKind(503, _UNAVAILABLE, "engine_loading", retry=True),
    EngineDeadError: ErrorKind(503, _UNAVAILABLE, "engine_down", retry=True),
    EngineShutdownError: ErrorKind(503, _UNAVAILABLE, "engine_shutting_down", retry=True),
}
INTERNAL_ERROR = ErrorKind(500, "server_error", "internal_error")


@dataclass(frozen=True, slots=True)
class ApiError:
    """An error as it is sent.

    Attributes:
        status: HTTP status.
        body: In OpenAI's shape.
        retry_after_s: Whole seconds for the Retry-After header, or None for no such header.
    """

    status: int
    body: ErrorResponse
    retry_after_s: int | None = None


def describe_error(error: BaseException) -> ApiError:
    """Tell an exception in OpenAI's words.

    One that is not in the table is a bug: the client learns that and nothing of the insides.
    """
    kind = next((ERROR_KINDS[cls] for cls in type(error).__mro__ if cls in ERROR_KINDS), None)
    if kind is None:
        message = "the server failed on this request; its log says why, under the request id"
        return ApiError(INTERNAL_ERROR.status, _body(INTERNAL_ERROR, message))
    retry_after_s = math.ceil(getattr(error, "retry_after_s", _RETRY_AFTER_S))
    return ApiError(
        status=kind.status,
        body=_body(
            kind,
            str(error),
            param=getattr(error, "param", None),
            code=getattr(error, "code", None),
        ),
        retry_after_s=max(1, retry_after_s) if kind.retry else None,
    )


def _body(
    kind: ErrorKind, message: str, *, param: str | None = None, code: str | None = None
) -> ErrorResponse:
    # A client's own lone surrogates may be quoted in the sentence; JSON in UTF-8 has none.
    message = message.encode(errors="backslashreplace").decode()
    if param is not None:
        param = param.encode(errors="backslashreplace").decode()
    return ErrorResponse(
        error=ErrorDetail(message=message, type=kind.type, param=param, code=code or kind.code)
    )
