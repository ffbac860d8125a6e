"""Errors as HTTP responses, all in OpenAI's shape."""

from __future__ import annotations

import logging
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from llmserve.errors import LlmserveError, RequestTimeoutError
from llmserve.openai.errors import (
    ApiError,
    AuthenticationError,
    MethodNotAllowedError,
    RouteNotFoundError,
    describe_error,
)
from llmserve.openai.responses import encode

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""Status in the log of a request whose client went away; nobody receives it."""


def error_response(error: BaseException) -> Response:
    """The response that tells a client of an error."""
    described: ApiError = describe_error(error)
    headers = {}
    if described.retry_after_s is not None:
        headers["Retry-After"] = str(described.retry_after_s)
    if isinstance(error, RequestTimeoutError):
        # OpenAI's SDK sends again what got a 408, and the client's time for it has passed.
        headers["X-Should-Retry"] = "false"
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(
        encode(described.body), described.status, headers=headers, media_type="application/json"
    )


def log_if_unexpected(error: BaseException, request_id: str) -> None:
    """Log what is a bug, with its traceback; what is raised on purpose speaks for itself."""
    if not isinstance(error, LlmserveError):
        logger.error("request %s failed", request_id, exc_info=error)


def add_error_handlers(app: FastAPI) -> None:
    """Answer errors that reach the framework, and the framework's own, in OpenAI's shape."""

    async def on_llmserve_error(request: Request, error: Exception) -> Response:
        return error_response(error)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == HTTPStatus.NOT_FOUND:
            return error_response(RouteNotFoundError(f"there is no {request.url.path}"))
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            response = error_response(
                MethodNotAllowedError(f"{request.url.path} does not know {request.method}")
            )
            response.headers.update(error.headers or {})
            return response
        return error_response(error)  # no route raises any other

    app.add_exception_handler(LlmserveError, on_llmserve_error)
    app.add_exception_handler(HTTPException, on_http_exception)
