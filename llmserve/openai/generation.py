"""The answers to all prompts of one API request, as one stream that can be left at any time.

It owns the order of updates, the clocks and the closing of every stream. It knows neither the
shape of chunks nor where the prompts came from.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from llmserve.core.request import FinishReason
from llmserve.core.sampling_params import SamplingParams
from llmserve.errors import EngineShutdownError
from llmserve.llm import AsyncLLM, RequestOutput, RequestStream
from llmserve.openai.observer import AnswerClock, RequestObserver
from llmserve.openai.responses import PromptTokensDetails, Usage


class Generation:
    """Opened with ``open``; iterate over ``updates``; always ``aclose``.

    Attributes:
        outputs: One per prompt, as far as they have come.
    """

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []
        self._streams: list[RequestStream] = []
        self._clocks: list[AnswerClock] = []

    @classmethod
    async def open(
        cls,
        llm: AsyncLLM,
        prompts: Sequence[Sequence[int]],
        sampling_params: Sequence[SamplingParams],
        *,
        request_id: str,
        arrival_s: float,
        observer: RequestObserver,
    ) -> Generation:
        """Submit every prompt, or none: what was submitted before a refusal is aborted.

        Args:
            llm: Generates.
            prompts: Token ids.
            sampling_params: One per prompt.
            request_id: Unique; prompt i is submitted as ``{request_id}-{i}``.
            arrival_s: When the request came, on ``time.perf_counter``.
            observer: Is told the times.

        Raises:
            InvalidRequestError: A prompt can never be served.
            EngineError: The engine takes no requests now.
        """
        generation = cls()
        try:
            for index, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
                stream = llm.generate(prompt, params, request_id=f"{request_id}-{index}")
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
        """
        try:
            async with aclosing(_merge(self._streams)) as merged:
                async for index, output in merged:
                    self._clocks[index].update(output.outputs, output.queue_s)
                    if any(answer.finish_reason == FinishReason.ABORT for answer in output.outputs):
                        raise EngineShutdownError("the server is shutting down; the answer was cut")
                    yield index, output
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
