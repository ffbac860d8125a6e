"""The routes: HTTP in, ``OpenAIServing`` does the work, HTTP out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

import msgspec
from fastapi import APIRouter, Request, Response

from llmserve.core.stats import EngineStats
from llmserve.errors import EngineError
from llmserve.openai.responses import encode
from llmserve.openai.serving import ChunkStream, OpenAIServing
from llmserve.server.body import read_json
from llmserve.server.disconnect import cancel_on_disconnect
from llmserve.server.metrics import Metrics
from llmserve.server.settings import ServerSettings
from llmserve.server.sse import AnyChunkStream, stream_chunks
from llmserve.server.state import ServingState

_STATS_TIMEOUT_S = 1.0
_READ = ["GET", "HEAD"]  # probes of load balancers ask with HEAD

Endpoint: TypeAlias = Callable[
    [OpenAIServing, object, str], Coroutine[Any, Any, "msgspec.Struct | AnyChunkStream"]
]


def create_router(state: ServingState, settings: ServerSettings, metrics: Metrics) -> APIRouter:
    """All routes of the server."""
    # Routes take the bare request: validation, and its errors, are OpenAIServing's.
    router = APIRouter(redirect_slashes=False)

    async def answer(request: Request, endpoint: Endpoint) -> Response:
        serving = state.require_serving()
        body = await read_json(request, settings.max_body_bytes)
        result = await cancel_on_disconnect(
            request.receive, endpoint(serving, body, request.state.request_id)
        )
        if isinstance(result, ChunkStream):
            return await stream_chunks(request, result, settings.keep_alive_s)
        return _json(result)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, OpenAIServing.create_completion)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, OpenAIServing.create_chat_completion)

    @router.api_route("/v1/models", methods=_READ)
    async def models() -> Response:
        return _json(state.require_serving().models())

    @router.api_route("/v1/models/{name:path}", methods=_READ)
    async def model(name: str) -> Response:
        return _json(state.require_serving().model(name))

    @router.api_route("/health", methods=_READ)
    async def health() -> Response:
        await state.check_health()
        return Response(b'{"status":"ok"}', media_type="application/json")

    @router.api_route("/version", methods=_READ)
    async def show_version() -> Response:
        return Response(msgspec.json.encode({"version": _version()}), media_type="application/json")

    @router.api_route("/metrics", methods=_READ)
    async def show_metrics() -> Response:
        stats = await _stats(state)
        return Response(metrics.render(stats), headers={"Content-Type": metrics.content_type})

    return router


async def _stats(state: ServingState) -> EngineStats:
    """The engine's numbers, or zeros: metrics must be there when the engine is not."""
    if state.serving is None:
        return EngineStats()
    try:
        async with asyncio.timeout(_STATS_TIMEOUT_S):
            return await state.serving.llm.engine.stats()
    except (EngineError, TimeoutError):
        return EngineStats()


def _json(answer: msgspec.Struct) -> Response:
    return Response(encode(answer), media_type="application/json")


def _version() -> str:
    try:
        return version("llmserve")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
