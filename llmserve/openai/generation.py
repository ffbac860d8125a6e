"""The answers to all prompts of one API request, as one stream that can be left at any time.

It owns the order of updates, the clocks and the closing of every stream. It knows neither the
shape of chunks nor where the prompts came from.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from llmserve.core.request import FinishReason
from llmserve.core.sampling_params import SamplingParams
from llmserve.errors import EngineShutdownError, RequestTimeoutError
from llmserve.llm import AsyncLLM, RequestOutput, RequestStream
from llmserve.openai.observer import AnswerClock, RequestObserver
from llmserve.openai.responses import PromptTokensDetails, Usage


@dataclass(frozen=True, slots=True)
class Prompt:
    """One of the prompts of an API request.

    Attributes:
        token_ids: As encoded or sent.
        text: If it was sent as text.
    """

    token_ids: Sequence[int]
    text: str | None = None


class Generation:
    """Opened with ``open``; iterate over ``updates``; always ``aclose``.

    Attributes:
        outputs: One per prompt, as far as they have come.
    """

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []
        self._streams: list[RequestStream] = []
        self._clocks: list[AnswerClock] = []
        self._timeout_s: float | None = None

    @classmethod
    async def open(
        cls,
        llm: AsyncLLM,
        prompts: Sequence[Prompt],
        sampling_params: Sequence[SamplingParams],
        *,
        request_id: str,
        priority: int,
        timeout_s: float | None,
        cache_salt: str | None,
        arrival_s: float,
        observer: RequestObserver,
    ) -> Generation:
        """Submit every prompt, or none: what was submitted before a refusal is aborted.

        Args:
            llm: Generates.
            prompts: What to answer.
            sampling_params: One per prompt.
            request_id: Unique; prompt i is submitted as ``{request_id}-{i}``.
            priority, timeout_s, cache_salt: As ``AsyncLLM.generate`` has them.
            arrival_s: When the request came, on ``time.perf_counter``.
            observer: Is told the times.

        Raises:
            InvalidRequestError: A prompt can never be served.
            EngineError: The engine takes no requests now.
        """
        generation = cls()
        generation._timeout_s = timeout_s
        try:
            for index, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
                stream = llm.generate(
                    prompt.token_ids,
                    params,
                    request_id=f"{request_id}-{index}",
                    prompt=prompt.text,
                    priority=priority,
                    timeout_s=timeout_s,
                    cache_salt=cache_salt,
                )
                generation._streams.append(stream)
                prompt_tokens = len(stream.output.prompt_token_ids)
                generation._clocks.append(AnswerClock(observer, params.n, prompt_tokens, arrival_s))
                generation.outputs.append(stream.output)
        except BaseException:
            await generation.aclose()
            raise
        return generation

    async def updates(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Yield (prompt index, its output) for each step's news, until every answer has ended.

        The output is changed in place by the next step of the same prompt, which waits until this
        one has been consumed.

        Raises:
            EngineError: The engine failed, or cut an answer because it shuts down.
            InvalidRequestError: An answer failed by its own fault.
            RequestTimeoutError: An answer did not end in time.
        """
        try:
            async with aclosing(_merge(self._streams)) as merged:
                async for index, output in merged:
                    self._clocks[index].update(output.outputs, output.queue_s)
                    reasons = {answer.finish_reason for answer in output.outputs}
                    if FinishReason.ABORT in reasons:
                        raise EngineShutdownError("the server is shutting down; the answer was cut")
                    if FinishReason.TIMEOUT in reasons:
                        timeout_s = round(self._timeout_s or 0.0, 3)
                        raise RequestTimeoutError(
                            f"the answer did not end within the timeout of {timeout_s:g} s"
                        )
                    yield index, output
        except RequestTimeoutError:
            for clock in self._clocks:
                clock.close("timeout")
            raise
        except Exception:
            for clock in self._clocks:
                clock.close("error")
            raise

    async def aclose(self) -> None:
        """Abort what still runs."""
        for clock in self._clocks:
            clock.close("abort")
        for stream in self._streams:
            await stream.aclose()

    def usage(self) -> Usage:
        """Token counts so far."""
        prompt_tokens = sum(len(output.prompt_token_ids) for output in self.outputs)
        completion_tokens = sum(
            len(answer.token_ids) for output in self.outputs for answer in output.outputs
        )
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(output.cached_tokens for output in self.outputs)
            ),
        )


_News = tuple[int, RequestOutput, asyncio.Future[None]]


async def _merge(
    streams: Sequence[RequestStream],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The streams' items as they come, with the index of their stream.

    A stream is advanced only after its last item was consumed: it yields the same object again.
    """
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[_News | BaseException | None] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async for output in streams[index]:
                consumed = loop.create_future()
                queue.put_nowait((index, output, consumed))
                await consumed
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    pumps = [asyncio.create_task(pump(index)) for index in range(len(streams))]
    try:
        num_open = len(pumps)
        while num_open:
            news = await queue.get()
            if news is None:
                num_open -= 1
            elif isinstance(news, BaseException):
                raise news
            else:
                index, output, consumed = news
                yield index, output
                consumed.set_result(None)
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
