"""Short ways to make requests, to read their answers, and to know what these should be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from llmserve.config import BuildConfig
from llmserve.core.request import Output, Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.engine.process import OutputStream
from llmserve.engine.tensorrt_llm import TensorRTLLMEngine
from llmserve.runtime.fake import expected_tokens

VOCAB_SIZE = 320
PROMPT = (5, 6, 7, 8)
LIMITS = BuildConfig(max_batch_size=8, max_num_tokens=64, max_seq_len=128, tokens_per_block=16)
TIMEOUT_S = 20.0  # far beyond what an answer takes: what hangs is to fail
VERSIONS = {"engine": "1.2.1", "huggingface": "1.3.0"}

Start = Callable[..., Awaitable[TensorRTLLMEngine]]


def make_request(
    prompt: tuple[int, ...] = PROMPT, *, eos: tuple[int, ...] = (), name: str = "r", **params: Any
) -> Request:
    settings = {"max_tokens": 12, "temperature": 0.0, "seed": 0, **params}
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(**settings),
        eos_token_ids=eos,
    )


def greedy(prompt: tuple[int, ...] = PROMPT, count: int = 12) -> list[int]:
    return expected_tokens(prompt, count, vocab_size=VOCAB_SIZE)


async def read(stream: OutputStream) -> list[Output]:
    """What a stream still brings."""
    async with asyncio.timeout(TIMEOUT_S):
        return [output async for output in stream]


async def outputs(engine: TensorRTLLMEngine, request: Request) -> list[Output]:
    seen = await read(engine.submit(request))
    assert [output.finish_reason is None for output in seen] == [True] * (len(seen) - 1) + [False]
    assert all(output.request_id == request.request_id for output in seen)
    return seen


async def answer(engine: TensorRTLLMEngine, request: Request) -> tuple[list[int], Output]:
    seen = await outputs(engine, request)
    return [token_id for output in seen for token_id in output.token_ids], seen[-1]


async def is_empty(engine: TensorRTLLMEngine) -> bool:
    """Whether no request is in its books."""
    return not engine._open
