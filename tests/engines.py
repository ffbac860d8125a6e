"""``ScriptedEngine``: an engine without a model, for tests of the layers above the Engine protocol.

What it says is known beforehand: by default it repeats the prompt (``echo``), otherwise a script
says which tokens come. It honours max_tokens, end-of-sequence and stop tokens, logprobs and aborts
as a real engine does, and it can be made slow, paused, overloaded, broken or dead.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Sequence

from llmserve.core.request import FinishReason, Output, Request, TokenLogprobs
from llmserve.core.stats import EngineStats
from llmserve.engine.admission import check_request
from llmserve.engine.engine import EngineInfo, Health
from llmserve.errors import EngineDeadError, EngineOverloadedError, EngineShutdownError

Script = Callable[[Request], Sequence[int]]


def echo(request: Request) -> list[int]:
    """The prompt, begun ``sequence_index`` tokens later; it comes again and again."""
    prompt, start = list(request.prompt_token_ids), request.sequence_index
    start %= len(prompt)
    return prompt[start:] + prompt[:start]


def expected_tokens(
    prompt_token_ids: Sequence[int], num_tokens: int, sequence_index: int = 0
) -> list[int]:
    """The first ``num_tokens`` tokens that the default script answers."""
    prompt = list(prompt_token_ids)
    return [prompt[(sequence_index + i) % len(prompt)] for i in range(num_tokens)]


def fake_logprobs(token_id: int, k: int, vocab_size: int) -> TokenLogprobs:
    """The log-probabilities ScriptedEngine reports for a token: rank 1, neighbours follow."""
    logprob = -0.125 * (token_id % 8 + 1)
    return TokenLogprobs(
        logprob=logprob,
        rank=1,
        top_token_ids=tuple((token_id + i) % vocab_size for i in range(k)),
        top_logprobs=tuple(logprob - i for i in range(k)),
    )


class ScriptedEngine:
    """An Engine whose answers are scripted.

    Args:
        script: The answer's tokens for a request. After the last one comes the request's first EOS
            token, if it has any (and the script is not ``echo``); without, the script starts over.
        vocab_size: Prompt ids outside [0, vocab_size) are refused.
        max_seq_len: Prompt plus max_tokens beyond it are refused.
        token_delay_s: Pause before every output.
        tokens_per_output: Tokens in one output, as speculation would bring.
        max_queue_size: Open requests beyond it are refused as overload; None for no limit.

    Attributes:
        requests: Every request submitted and accepted, in order.
        aborted: The ids of requests that were aborted or left while running, in order.
        overloaded: Set it, and every submit is refused as overload.
        die_after_tokens: Set it, and the engine dies once it has made so many tokens in all.
        request_errors: request_id -> sentence: that request fails at its first output.
        num_cached_tokens, queue_s: Reported with every output.
    """

    def __init__(
        self,
        script: Script | Sequence[int] = echo,
        *,
        vocab_size: int = 512,
        max_seq_len: int = 256,
        token_delay_s: float = 0.0,
        tokens_per_output: int = 1,
        max_queue_size: int | None = None,
    ) -> None:
        self.script: Script = script if callable(script) else (lambda _: script)
        self.token_delay_s = token_delay_s
        self.tokens_per_output = tokens_per_output
        self.max_queue_size = max_queue_size
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.overloaded = False
        self.die_after_tokens: int | None = None
        self.request_errors: dict[str, str] = {}
        self.num_cached_tokens = 0
        self.queue_s = 0.0
        self.started = False
        self.shut_down = False
        self.dead: str | None = None
        self.num_tokens = 0
        self.open: dict[str, ScriptedStream] = {}
        self._paused: asyncio.Event | None = None
        self._finished: dict[str, int] = {}
        self._info = EngineInfo(
            backend="native",
            device="cpu",
            dtype="float32",
            quant_algo=None,
            vocab_size=vocab_size,
            max_batch_size=8,
            max_num_tokens=1024,
            max_seq_len=max_seq_len,
            tokens_per_block=32,
            # Any one request fits, so that max_seq_len is the limit that tests meet.
            num_kv_blocks=max(64, -(-max_seq_len // 32)),
            kv_cache_bytes=1 << 20,
            weights_bytes=1 << 20,
            load_s=0.0,
            pid=os.getpid(),
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def start(self) -> None:
        self.started = True

    def submit(self, request: Request) -> ScriptedStream:
        self._check(request)
        stream = ScriptedStream(self, request)
        self.requests.append(request)
        self.open[request.request_id] = stream
        return stream

    def _check(self, request: Request) -> None:
        if self.dead is not None:
            raise EngineDeadError(self.dead)
        if self.shut_down:
            raise EngineShutdownError("the engine is shutting down")
        if self.overloaded or (
            self.max_queue_size is not None and len(self.open) >= self.max_queue_size
        ):
            raise EngineOverloadedError("the queue is full", retry_after_s=2.0)
        assert request.request_id not in self.open, f"{request.request_id} is used twice"
        check_request(request, self.info)

    async def abort(self, request_id: str) -> None:
        stream = self.open.pop(request_id, None)
        if stream is not None:
            self.aborted.append(request_id)
            stream.pending.append(Output(request_id=request_id, finish_reason=FinishReason.ABORT))
            stream.news.set()

    async def stats(self) -> EngineStats:
        return EngineStats(
            num_running_requests=len(self.open),
            max_num_blocks=self.info.num_kv_blocks,
            free_num_blocks=self.info.num_kv_blocks - len(self.open),
            used_num_blocks=len(self.open),
            prompt_tokens=sum(len(r.prompt_token_ids) for r in self.requests),
            generation_tokens=self.num_tokens,
            finished=dict(self._finished),
        )

    async def health(self) -> Health:
        if self.dead is not None:
            return Health(False, self.dead)
        if not self.started or self.shut_down:
            return Health(False, "the engine is not running")
        return Health(True)

    async def shutdown(self, *, drain_s: float = 0.0) -> None:
        self.shut_down = True
        deadline = asyncio.get_running_loop().time() + drain_s
        while self.open and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        for request_id in list(self.open):
            await self.abort(request_id)

    def pause(self) -> None:
        """Make no more tokens until ``resume``."""
        self._paused = asyncio.Event()

    def resume(self) -> None:
        """Go on after ``pause``."""
        if self._paused is not None:
            self._paused.set()
            self._paused = None

    def die(self, reason: str = "the engine process died") -> None:
        """Fail every open request and refuse new ones with EngineDeadError until ``revive``."""
        self.dead = reason
        streams, self.open = list(self.open.values()), {}
        for stream in streams:
            stream.pending.clear()
            stream.news.set()

    def revive(self) -> None:
        """Serve again after ``die``."""
        self.dead = None
        self.die_after_tokens = None


class ScriptedStream:
    """The outputs of one request: an async iterator with ``aclose``."""

    def __init__(self, engine: ScriptedEngine, request: Request) -> None:
        self.engine = engine
        self.request = request
        self.pending: deque[Output] = deque()
        self.news = asyncio.Event()
        self.tokens = list(engine.script(request))
        self.position = 0
        self.ended = False

    def __aiter__(self) -> ScriptedStream:
        return self

    async def __anext__(self) -> Output:
        if self.ended:
            raise StopAsyncIteration
        try:
            await self._wait()
        except BaseException:
            await self.aclose()
            raise
        output = self.pending.popleft() if self.pending else self._next_output()
        if output.finish_reason is not None:
            self.ended = True
            self.engine.open.pop(self.request.request_id, None)
            name = output.finish_reason.value
            self.engine._finished[name] = self.engine._finished.get(name, 0) + 1
        return output

    async def aclose(self) -> None:
        if not self.ended:
            self.ended = True
            await self.engine.abort(self.request.request_id)

    async def _wait(self) -> None:
        """Pass the time until the next output, or until an abort or a death comes first."""
        if self.engine.token_delay_s and not self.news.is_set():
            try:
                async with asyncio.timeout(self.engine.token_delay_s):
                    await self.news.wait()
            except TimeoutError:
                pass
        else:
            await asyncio.sleep(0)
        while (paused := self.engine._paused) is not None and not self.news.is_set():
            waits = [asyncio.ensure_future(event.wait()) for event in (paused, self.news)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    def _next_output(self) -> Output:
        request, engine = self.request, self.engine
        params, request_id = request.sampling_params, request.request_id
        if engine.dead is not None or request_id not in engine.open:
            self.ended = True
            raise EngineDeadError(engine.dead or "the engine process died")
        common = {
            "request_id": request_id,
            "num_cached_tokens": engine.num_cached_tokens,
            "queue_s": engine.queue_s,
        }
        if request_id in engine.request_errors:
            error = engine.request_errors[request_id]
            return Output(**common, finish_reason=FinishReason.ERROR, error=error)
        token_ids: list[int] = []
        finish_reason, stop_reason = None, None
        while finish_reason is None and len(token_ids) < engine.tokens_per_output:
            token = self._next_token()
            token_ids.append(token)
            engine.num_tokens += 1
            if token in request.eos_token_ids:
                finish_reason = FinishReason.STOP
            elif token in params.stop_token_ids:
                finish_reason, stop_reason = FinishReason.STOP, token
            elif self.position == params.max_tokens:
                finish_reason = FinishReason.LENGTH
            if engine.die_after_tokens is not None and engine.num_tokens >= engine.die_after_tokens:
                engine.die()
        logprobs = None
        if params.logprobs is not None:
            logprobs = tuple(
                fake_logprobs(token, params.logprobs, engine.info.vocab_size) for token in token_ids
            )
        return Output(
            **common,
            token_ids=tuple(token_ids),
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def _next_token(self) -> int:
        position, self.position = self.position, self.position + 1
        scripted = self.engine.script is not echo
        if scripted and position >= len(self.tokens) and self.request.eos_token_ids:
            return self.request.eos_token_ids[0]
        return self.tokens[position % len(self.tokens)] if self.tokens else 0
