"""What every request passes: its id, the log line, the last resort, and the key check.

Plain ASGI: Starlette's BaseHTTPMiddleware would hide a client's disconnect from the routes.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmserve.openai.errors import AuthenticationError
from llmserve.server.errors import CLIENT_CLOSED_REQUEST, error_response, log_if_unexpected
from llmserve.server.state import ServingState

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/metrics"})
"""Paths without a key: what probes and scrapers read. They are not worth a log line either."""

_MAX_REQUEST_ID_CHARS = 128
_NOT_IN_REQUEST_ID = re.compile(r"[^A-Za-z0-9._:@/+=-]")


class RequestMiddleware:
    """Gives each request an id, its client's own if it has sent one, counts it as open, and logs
    it when its response has been sent.

    An exception that got past everything else becomes a 500 here, so that it too has the id.
    """

    def __init__(self, app: ASGIApp, state: ServingState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._state.open_request():
            await self._handle(scope, receive, send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        start_s = time.perf_counter()
        request_id = _request_id(Headers(scope=scope).get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_CLOSED_REQUEST
        except Exception as error:
            log_if_unexpected(error, request_id)
            if status:
                raise  # the response has begun: closing the connection is all that is left
            await error_response(error)(scope, receive, send_with_id)
        finally:
            logger.log(
                logging.DEBUG if scope["path"] in OPEN_PATHS else logging.INFO,
                "%s %r %d in %.3f s, request %s",
                scope["method"],
                scope["path"],
                status,
                time.perf_counter() - start_s,
                request_id,
            )


class AuthMiddleware:
    """Lets only requests with a known bearer token through, to all paths but OPEN_PATHS."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._api_keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            authorization = Headers(scope=scope).get("authorization", "")
            if not self._knows(authorization):
                error = AuthenticationError(
                    "the API key is wrong"
                    if authorization
                    else "an API key is needed: send it as Authorization: Bearer KEY"
                )
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _knows(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        given = token.strip().encode()
        # Every key is compared, each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(given, key) for key in self._api_keys]
        return scheme.lower() == "bearer" and any(matches)


def _request_id(given: str) -> str:
    cleaned = _NOT_IN_REQUEST_ID.sub("", given)[:_MAX_REQUEST_ID_CHARS]
    return cleaned or uuid.uuid4().hex
