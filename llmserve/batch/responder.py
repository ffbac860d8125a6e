"""A job's view of the engine: starts it, answers lines through the OpenAI layer, and stops it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from llmserve.batch.format import JsonObject, Response
from llmserve.config import EngineConfig
from llmserve.core.request import BATCH_PRIORITY, INTERACTIVE_PRIORITY
from llmserve.llm import AsyncLLM, open_llm
from llmserve.openai.serving import OpenAIServing


class EngineResponder:
    """Answers requests with a running engine.

    Args:
        llm: The model; started and shut down by whoever made it.
        served_model_name: The name that bodies must ask for.
    """

    def __init__(self, llm: AsyncLLM, served_model_name: str) -> None:
        self._llm = llm
        # TensorRT-LLM's API knows no priorities.
        is_native = llm.engine.info.backend == "native"
        priority = BATCH_PRIORITY if is_native else INTERACTIVE_PRIORITY
        self._serving = OpenAIServing(llm, served_model_name, priority=priority)

    @property
    def max_batch_size(self) -> int:
        """Most requests that the engine computes in one step."""
        return self._llm.engine.info.max_batch_size

    async def respond(self, url: str, body: JsonObject, request_id: str) -> Response:
        """Answer one request with the status and body that HTTP would have; raises nothing."""
        answer = await self._serving.respond(url, body, request_id)
        return Response(answer.status, answer.body)

    async def ready(self) -> bool:
        """Whether the engine serves."""
        return (await self._llm.engine.health()).ok


@contextlib.asynccontextmanager
async def open_engine_responder(
    model: str | Path, served_model_name: str, *, engine_config: EngineConfig | None = None
) -> AsyncIterator[EngineResponder]:
    """Start a model's engine for the time of a job.

    Args:
        model: What ``open_llm`` takes.
        served_model_name: The name that bodies must ask for.
        engine_config: What the engine is started with.

    Raises:
        LlmserveError: What ``open_llm`` raises.
    """
    llm = await open_llm(model, engine_config=engine_config)
    try:
        yield EngineResponder(llm, served_model_name)
    finally:
        await llm.engine.shutdown()
