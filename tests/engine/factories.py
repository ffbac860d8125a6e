"""Short ways to make what the engine's tests need: specs, requests, answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from llmserve.config import BuildConfig, EngineConfig, KvCacheConfig
from llmserve.core.request import FinishReason, Output, Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.engine.process import OutputStream, ProcessEngine
from llmserve.engine.runner_spec import FakeRunnerSpec
from llmserve.runtime.fake import expected_tokens

# The fake runner's own default holds one long request.
ROOMY = EngineConfig(kv_cache=KvCacheConfig(max_total_bytes=4 * 2**20))
BUILD = BuildConfig(max_batch_size=64, max_num_tokens=256, max_seq_len=256, tokens_per_block=4)


def make_spec(**settings: object) -> FakeRunnerSpec:
    return FakeRunnerSpec(**{"build": BUILD, **settings})  # type: ignore[arg-type]


def make_engine(config: EngineConfig = ROOMY, **settings: object) -> ProcessEngine:
    return ProcessEngine(Path("unused"), config, runner=make_spec(**settings))


def make_prompt(index: int, length: int = 10) -> tuple[int, ...]:
    return tuple((index * 7 + position) % 256 for position in range(length))


def make_request(
    index: int, *, prompt_length: int = 10, max_tokens: int = 20, request_id: str | None = None
) -> Request:
    return Request(
        request_id=request_id or f"request-{index}",
        prompt_token_ids=make_prompt(index, prompt_length),
        sampling_params=SamplingParams(max_tokens=max_tokens, seed=0),
    )


async def drain(stream: OutputStream) -> tuple[list[int], FinishReason | None]:
    """All tokens of a stream, and how it ended; asserts that only its last output is terminal."""
    token_ids: list[int] = []
    last: Output | None = None
    async for output in stream:
        assert last is None or last.finish_reason is None
        token_ids += output.token_ids
        last = output
    assert last is not None
    return token_ids, last.finish_reason


async def generate(engine: ProcessEngine, request: Request) -> None:
    """Serve a request to its end and check every token of the answer."""
    token_ids, finish_reason = await drain(engine.submit(request))
    count = request.sampling_params.max_tokens
    assert count is not None
    assert token_ids == expected_tokens(request.prompt_token_ids, count)
    assert finish_reason is FinishReason.LENGTH


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 10.0) -> float:
    """Wait for a condition; the seconds it took."""
    begun_s = time.monotonic()
    while not await condition():
        assert time.monotonic() - begun_s < timeout_s, "the condition did not come true in time"
        await asyncio.sleep(0.01)
    return time.monotonic() - begun_s
