"""Reading a request's body: bounded, and strictly JSON."""

from __future__ import annotations

from fastapi import Request
from pydantic import JsonValue
from pydantic_core import from_json

from llmserve.openai.errors import (
    BodyTooLargeError,
    MalformedBodyError,
    UnsupportedMediaTypeError,
)


async def read_json(request: Request, max_body_bytes: int) -> JsonValue:
    """Read and decode a JSON body, never holding more than ``max_body_bytes`` of it.

    Raises:
        UnsupportedMediaTypeError: The Content-Type is not JSON. (A web page may send other types
            to a server on localhost without asking; JSON it may not.)
        BodyTooLargeError: By its Content-Length, or as it turns out while reading.
        MalformedBodyError: It is not JSON: NaN, lone surrogates, absurd depth or numbers included.
    """
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaTypeError(
            f"the Content-Type is {content_type[:80]!r}; it must be application/json"
        )
    body = await _read(request, max_body_bytes)
    try:
        decoded: JsonValue = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise MalformedBodyError(f"the body is not valid JSON: {error}") from None
    return decoded


async def _read(request: Request, max_body_bytes: int) -> bytes:
    content_length = request.headers.get("content-length", "")
    if content_length.isdecimal() and int(content_length) > max_body_bytes:
        raise _too_large(max_body_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_body_bytes:
            raise _too_large(max_body_bytes)
    return bytes(body)


def _too_large(max_body_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is larger than {max_body_bytes} bytes, the server's limit")
