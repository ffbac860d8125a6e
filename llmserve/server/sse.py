"""A stream of chunks as server-sent events.

The headers wait for the first chunk, so that what goes wrong until then still has a proper status,
but no longer than the keep-alive interval. After them an error can only be an event. The stream
ends with ``[DONE]`` unless an error ended it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import TypeAlias

from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from llmserve.openai.errors import describe_error
from llmserve.openai.responses import ChatCompletionChunk, Chunk, Completion, encode
from llmserve.openai.serving import ChunkStream
from llmserve.server.disconnect import wait_for_disconnect
from llmserve.server.errors import log_if_unexpected

logger = logging.getLogger(__name__)

AnyChunkStream: TypeAlias = "ChunkStream[Completion] | ChunkStream[ChatCompletionChunk]"

_DONE = b"data: [DONE]\n\n"


class ChunkStreamResponse(EventSourceResponse):
    """Sends chunks as they come; aborts their generation when the client goes away.

    Made by ``stream_chunks``.
    """

    def __init__(
        self,
        first: asyncio.Task[Chunk],
        chunks: AnyChunkStream,
        *,
        keep_alive_s: float,
        request_id: str,
    ) -> None:
        self._first = first
        self._chunks = chunks
        self._request_id = request_id
        self._events = self._write_events()
        super().__init__(
            self._events,
            sep="\n",
            ping=keep_alive_s,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Whichever way it ended, and even if no event was asked for.
            await self._events.aclose()
            await close_chunks(self._first, self._chunks)

    async def _write_events(self) -> AsyncGenerator[bytes, None]:
        try:
            yield _event(encode(await self._first))
            async for chunk in self._chunks:
                yield _event(encode(chunk))
        except StopAsyncIteration:
            pass  # there was not even a first chunk
        except Exception as error:
            log_if_unexpected(error, self._request_id)
            yield _event(encode(describe_error(error).body))
            return
        yield _DONE


async def stream_chunks(
    request: Request, chunks: AnyChunkStream, keep_alive_s: float
) -> ChunkStreamResponse:
    """Begin a stream.

    Raises:
        LlmserveError: The generation failed before its first chunk.
        ClientDisconnect: The client went away before.
    """
    first: asyncio.Task[Chunk] = asyncio.ensure_future(_next(chunks))
    gone = asyncio.create_task(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({first, gone}, timeout=keep_alive_s, return_when=asyncio.FIRST_COMPLETED)
        if first.done():
            error = first.exception()
            if error is not None and not isinstance(error, StopAsyncIteration):
                raise error
        elif gone.done():
            raise ClientDisconnect
    except BaseException:
        await close_chunks(first, chunks)
        raise
    finally:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
    return ChunkStreamResponse(
        first, chunks, keep_alive_s=keep_alive_s, request_id=request.state.request_id
    )


async def close_chunks(first: asyncio.Task[Chunk], chunks: AnyChunkStream) -> None:
    """Leave a stream whose first chunk may still be awaited. Safe to call more than once."""
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await chunks.aclose()


async def _next(chunks: AnyChunkStream) -> Chunk:
    return await anext(chunks)


def _event(data: bytes) -> bytes:
    return b"data: %b\n\n" % data
