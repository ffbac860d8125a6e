"""Its results: one object that changes at every step."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any


class RequestError(RuntimeError):
    """One request failed."""


@dataclass(slots=True)
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    last_token_ids_len: int = 0

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self.last_token_ids_len :]

    @property
    def text_diff(self) -> str:
        return ""


@dataclass(slots=True, kw_only=True)
class Response:
    """What the executor sends for one sequence of one request."""

    sequence: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    final: bool = False
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: Exception | str | None = None


class RequestOutput:
    """Made by generate_async alone."""

    def __init__(self, executor: Any, request_id: int, inputs: list[int], params: Any) -> None:
        self._executor = executor
        self._params = params
        self._done = False
        self._failed = False
        self._aborted = False
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Response] = asyncio.Queue()
        self.request_id = request_id
        self.prompt = None
        self.prompt_token_ids = inputs
        self.outputs = [CompletionOutput(index) for index in range(params.n)]
        self.context_logits: Any = None
        self.cached_tokens = 0

    @property
    def finished(self) -> bool:
        return self._done

    def abort(self) -> None:
        self._executor.abort(self.request_id)
        self._aborted = True

    def aborted(self) -> bool:
        return self._aborted

    async def aresult(self) -> RequestOutput:
        async for _ in self:
            pass
        return self

    def __await__(self) -> Any:
        return self.aresult().__await__()

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        assert not self._failed, "a result that has failed is awaited again"
        if self._done:
            raise StopAsyncIteration
        self._handle(await self._queue.get())
        return self

    def send(self, response: Response) -> None:
        """Called by the executor's thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, response)

    def _handle(self, response: Response) -> None:
        if isinstance(response.error, str):
            self._failed = True
            raise RequestError(response.error)
        if response.error is not None:
            self._failed = True
            self._executor.stop()
            raise response.error
        output = self.outputs[response.sequence]
        if self._params.return_context_logits and response.finish_reason != "cancelled":
            self.context_logits = self._executor.context_logits(self.prompt_token_ids)
        # The list itself grows: whoever kept it sees the next steps in it.
        output.last_token_ids_len = len(output.token_ids)
        output.token_ids.extend(response.token_ids)
        output.logprobs.extend(response.logprobs)
        self.cached_tokens = len(self.prompt_token_ids) // 2
        if response.final:
            self._done = True
            output.finish_reason = response.finish_reason
            output.stop_reason = response.stop_reason
            if response.stop_reason is not None and not self._params.include_stop_str_in_output:
                del output.token_ids[-1]


class IterationResult:
    """The statistics: over once none came for a time, until something new is submitted."""

    def __init__(self) -> None:
        self.timeout: float = 2
        self.done = False
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[str] = asyncio.Queue()

    def send(self, iteration: dict[str, Any]) -> None:
        """Called by the executor's thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, json.dumps(iteration))

    def __aiter__(self) -> IterationResult:
        return self

    async def __anext__(self) -> dict[str, Any]:
        if self.done:
            raise StopAsyncIteration
        try:
            text = await asyncio.wait_for(self._queue.get(), self.timeout)
        except TimeoutError:
            self.done = True
            raise StopAsyncIteration from None
        return dict(json.loads(text))


async def no_iterations() -> AsyncIterator[dict[str, Any]]:
    for iteration in ():
        yield iteration
