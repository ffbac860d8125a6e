"""NVIDIA's LLM as an ``Engine`` for asyncio programs.

It schedules for itself and owns its KV cache. This keeps the books of the open requests around it:

    submit --> generate_async --> a task per request reads its result, one step after the other
    OutputStream <-- Outputs <----'    RequestError: that request fails, and nothing else
                                       anything else, or a hang: every open stream raises
                                       EngineDeadError, and the engine stays dead

A stream that is left early stays in the books until TensorRT-LLM says 'cancelled', so that its id
is not taken twice and ``shutdown`` knows what still runs. There is no restart: its workers cannot
be replaced from here, and whoever runs the server sees /health fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from llmserve.config import EngineConfig
from llmserve.core import admission
from llmserve.core.request import FinishReason, Output, Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.stats import EngineStats
from llmserve.engine.engine import EngineInfo, Health
from llmserve.engine.lifecycle import EngineLifecycle
from llmserve.engine.process import OutputStream
from llmserve.engine.tensorrt_llm.answer import AnswerReader
from llmserve.engine.tensorrt_llm.loading import LoadedLLM, load
from llmserve.engine.tensorrt_llm.model import TensorRTLLMModel, read_model
from llmserve.engine.tensorrt_llm.sampling import sampling_arguments
from llmserve.engine.tensorrt_llm.statistics import StatisticsBook
from llmserve.engine.tensorrt_llm.thread import in_thread
from llmserve.errors import (
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    LlmserveError,
)
from llmserve.runtime.tensorrt_llm_release import required_release

logger = logging.getLogger(__name__)

_STATISTICS_TIMEOUT_S = 1.0  # how long its iterator waits for one more iteration
_STATISTICS_PAUSE_S = 0.2
_CANCEL_AGAIN_S = 0.1
_SHUTDOWN_TIMEOUT_S = 30.0  # for its own shutdown, which hangs with it


@dataclass(slots=True, eq=False)
class _OpenRequest:
    """A request in the books.

    Attributes:
        request: As submitted.
        result: NVIDIA's result of it.
        queue: Whoever listens reads here; None once nobody does.
        reader: What of the result is read.
        aborted: TensorRT-LLM was asked to end it.
        timer: Ends it when its timeout has passed; None if it has none.
        timed_out: That has happened.
        task: Reads the result.
    """

    request: Request
    result: Any
    queue: asyncio.Queue[Output | LlmserveError] | None
    reader: AnswerReader
    aborted: bool = False
    timer: asyncio.TimerHandle | None = None
    timed_out: bool = False
    task: asyncio.Task[None] | None = None


class TensorRTLLMEngine(EngineLifecycle):
    """TensorRT-LLM behind the ``Engine`` protocol. All methods belong to one event loop.

    Args:
        directory: A TensorRT engine (TensorRT-LLM up to 1.2) or a Hugging Face checkpoint (1.3 on).
        config: What to start it with.
        gather_generation_logits: Let a TensorRT engine give log-probabilities, which costs speed:
            TensorRT-LLM then runs it in this process.
    """

    def __init__(
        self,
        directory: Path,
        config: EngineConfig | None = None,
        *,
        gather_generation_logits: bool = False,
    ) -> None:
        super().__init__(config)
        self._directory = directory
        self._gather_generation_logits = gather_generation_logits
        self._open: dict[str, _OpenRequest] = {}
        self._some_open = asyncio.Event()
        self._statistics = StatisticsBook()
        self._loaded: LoadedLLM | None = None  # set while it serves
        self._llm: Any = None  # set until it has been shut down
        self._max_prompt_tokens: int | None = None
        self._background: list[asyncio.Task[None]] = []
        self._burial: asyncio.Task[None] | None = None

    # --- the Engine protocol --------------------------------------------------------------------

    def submit(self, request: Request) -> OutputStream:
        """Queue a request; see ``Engine.submit``.

        Raises:
            InvalidRequestError: Also for a parameter that TensorRT-LLM cannot honour.
        """
        loaded = self._serving()
        admission.check_request(
            request,
            max_seq_len=self.info.max_seq_len,
            max_kv_tokens=self.info.kv_cache_tokens,
            max_prompt_tokens=self._max_prompt_tokens,
            vocab_size=self.info.vocab_size,
        )
        if request.request_id in self._open:
            raise InvalidRequestError(f"request_id {request.request_id!r} is in use already")
        queued = len(self._open) - self.info.max_batch_size
        self._check_queue(queued)
        result = self._generate(loaded, request)
        queue: asyncio.Queue[Output | LlmserveError] = asyncio.Queue()
        entry = _OpenRequest(request, result, queue, AnswerReader(request))
        if not self._open:
            self._heard_something = True  # the silence so far was idleness
            self._none_open.clear()
            self._some_open.set()
        self._open[request.request_id] = entry
        self._statistics.submitted(request)
        if request.timeout_s is not None:
            loop = asyncio.get_running_loop()
            entry.timer = loop.call_later(request.timeout_s, self._time_out, entry)
        entry.task = asyncio.create_task(self._read(entry, loaded))
        return OutputStream(asyncio.get_running_loop(), queue, partial(self._leave, entry))

    async def abort(self, request_id: str) -> None:
        """End a request with finish reason ABORT. Unknown ids are ignored."""
        if (entry := self._open.get(request_id)) is not None:
            self._abort(entry)

    async def stats(self) -> EngineStats:
        """The latest snapshot: TensorRT-LLM's numbers are those of its last iteration."""
        return self._statistics.snapshot(len(self._open))

    async def shutdown(self, *, drain_s: float = 0.0) -> None:
        """Refuse new requests, let open ones end for up to ``drain_s`` seconds, abort the rest and
        shut the LLM down. Safe to call twice, and to call again if the first call was cancelled.
        """
        self._closing = True
        self._health = Health(False, "the engine is shutting down")
        async with self._shutdown_lock:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._none_open.wait(), drain_s)
            reading = list(self._open.values())
            for entry in reading:
                self._abort(entry)
                self._end(entry, _aborted(entry))
            await _stop([self._starting, *self._background, *(entry.task for entry in reading)])
            self._loaded = None
            await self._bury()
            self._health = Health(False, "the engine has shut down")

    # --- requests -------------------------------------------------------------------------------

    def _serving(self) -> LoadedLLM:
        self._check_serves(alive=self._loaded is not None)
        assert self._loaded is not None
        return self._loaded

    def _generate(self, loaded: LoadedLLM, request: Request) -> Any:
        """Hand a request to the LLM."""
        arguments = sampling_arguments(request, loaded.abilities)
        if arguments["max_tokens"] is None:
            arguments["max_tokens"] = self.info.max_seq_len - len(request.prompt_token_ids)
        # Only where there is one: it is among the newer arguments.
        salt = {} if request.cache_salt is None else {"cache_salt": request.cache_salt}
        try:
            return loaded.llm.generate_async(
                inputs=list(request.prompt_token_ids),
                sampling_params=loaded.sampling_params(**arguments),
                streaming=True,
                **salt,
            )
        except (ValueError, TypeError) as error:
            raise InvalidRequestError(f"TensorRT-LLM refuses the request: {error}") from error
        except Exception as error:  # whatever it is, the LLM does not survive it
            self._die(f"TensorRT-LLM takes no requests any more ({error})")
            raise EngineDeadError(self._health.reason) from error

    async def _read(self, entry: _OpenRequest, loaded: LoadedLLM) -> None:
        """Hand out what a request brings, to its end."""
        try:
            async for _ in entry.result:
                self._heard_something = True
                if entry.reader.reads_prompt_next(entry.result):
                    outputs = await asyncio.to_thread(entry.reader.read, entry.result)
                else:
                    outputs = entry.reader.read(entry.result)
                ended = bool(outputs) and outputs[-1].finish_reason is not None
                if ended and not entry.result.finished:
                    self._abort(entry)  # a fault that only the reader has seen
                for output in outputs:
                    self._put(entry, output)
                if ended:
                    return
            error = "TensorRT-LLM left the request without an end"
        except loaded.request_error as request_error:
            error = str(request_error) or "TensorRT-LLM failed on this request"
        except Exception as fault:  # whatever it is, the LLM does not survive it
            self._die(f"TensorRT-LLM failed ({fault})")
            return
        self._heard_something = True
        self._put(
            entry,
            Output(
                request_id=entry.request.request_id,
                finish_reason=FinishReason.ERROR,
                error=error,
            ),
        )

    def _abort(self, entry: _OpenRequest) -> None:
        """Ask for a request's end; it comes as 'cancelled', later."""
        if entry.aborted or self._open.get(entry.request.request_id) is not entry:
            return
        entry.aborted = True
        try:
            entry.result.abort()
        except Exception as error:  # whatever it is, the LLM does not survive it
            self._die(f"TensorRT-LLM could not abort a request ({error})")

    def _time_out(self, entry: _OpenRequest) -> None:
        """Its time is over: end it, with what it has."""
        if not entry.aborted:
            entry.timed_out = True
            self._abort(entry)

    def _leave(self, entry: _OpenRequest) -> None:
        """Nobody listens to this request any more."""
        entry.queue = None
        self._abort(entry)

    def _put(self, entry: _OpenRequest, output: Output) -> None:
        """Hand an output to whoever listens; the last one closes the books on its request."""
        self._statistics.generated(len(output.token_ids))
        if output.finish_reason is not None:
            self._end(entry, output)
        elif entry.queue is not None:
            entry.queue.put_nowait(output)

    def _end(self, entry: _OpenRequest, last: Output | LlmserveError) -> None:
        if self._open.get(entry.request.request_id) is not entry:
            return
        del self._open[entry.request.request_id]
        if entry.timer is not None:
            entry.timer.cancel()
        reason = last.finish_reason if isinstance(last, Output) else FinishReason.ERROR
        if entry.timed_out and isinstance(last, Output) and reason is FinishReason.ABORT:
            reason = FinishReason.TIMEOUT
            error = f"the timeout of {entry.request.timeout_s:g} s has passed"
            last = replace(last, finish_reason=reason, error=error)
        assert reason is not None
        self._statistics.ended(entry.request, reason, entry.reader.num_cached_tokens)
        if entry.queue is not None:
            entry.queue.put_nowait(last)
        if not self._open:
            self._none_open.set()
            self._some_open.clear()

    # --- the LLM --------------------------------------------------------------------------------

    async def _load(self) -> None:
        """Load the model and answer a first request with it.

        Raises:
            ConfigError: TensorRT-LLM is not installed or too old, or a setting cannot be honoured.
            CheckpointError: The directory is nothing that the installed release runs.
            EngineError: It did not load, or did not answer.
        """
        begun_s = time.monotonic()
        release = required_release()
        model = read_model(self._directory, self._config, release)
        logger.info("loading %s with %s", model.directory, release)
        load_it = partial(
            load,
            model,
            self._config,
            release,
            gather_generation_logits=self._gather_generation_logits,
        )
        loaded = await in_thread(load_it, unclaimed=lambda late: late.llm.shutdown())
        self._llm = loaded.llm
        try:
            await asyncio.wait_for(self._answer_once(loaded), self._config.stall_timeout_s)
        except TimeoutError:
            await self._bury()
            raise EngineError(
                "TensorRT-LLM loaded the model and gave no answer for "
                f"{self._config.stall_timeout_s:g} s"
            ) from None
        except Exception as error:
            await self._bury()
            raise EngineError(f"TensorRT-LLM failed on its first request: {error}") from error
        self._info = self._describe(model, time.monotonic() - begun_s)
        self._max_prompt_tokens = model.max_prompt_tokens
        self._loaded = loaded
        self._background = [
            asyncio.create_task(self._follow_statistics(loaded)),
            asyncio.create_task(self._watch()),
        ]
        if not self._closing:
            self._health = Health(True)

    async def _answer_once(self, loaded: LoadedLLM) -> None:
        """A first token, which also brings the first statistics: the size of the KV cache."""
        request = Request(
            request_id="warm-up",
            prompt_token_ids=(0,),
            sampling_params=SamplingParams(max_tokens=1, temperature=0.0),
        )
        arguments = sampling_arguments(request, loaded.abilities)
        async for _ in loaded.llm.generate_async(
            inputs=list(request.prompt_token_ids),
            sampling_params=loaded.sampling_params(**arguments),
            streaming=True,
        ):
            pass
        async for iteration in loaded.llm.get_stats_async(timeout=_STATISTICS_TIMEOUT_S):
            self._statistics.iteration(iteration)
            break

    def _describe(self, model: TensorRTLLMModel, load_s: float) -> EngineInfo:
        tokens_per_block = self._statistics.tokens_per_block or model.tokens_per_block
        num_kv_blocks = self._statistics.max_num_blocks
        if not num_kv_blocks:
            num_kv_blocks = -(-model.max_seq_len // tokens_per_block)
            logger.warning(
                "TensorRT-LLM told no size of its KV cache; it is taken to hold one request"
            )
        last = f"-{model.world_size - 1}" if model.world_size > 1 else ""
        return EngineInfo(
            backend="tensorrt-llm",
            device=f"cuda:0{last}",
            dtype=model.dtype,
            quant_algo=model.quant_algo,
            vocab_size=model.vocab_size,
            max_batch_size=model.max_batch_size,
            max_num_tokens=model.max_num_tokens,
            max_seq_len=model.max_seq_len,
            tokens_per_block=tokens_per_block,
            num_kv_blocks=num_kv_blocks,
            kv_cache_bytes=num_kv_blocks * tokens_per_block * model.kv_bytes_per_token,
            weights_bytes=model.weights_bytes,
            load_s=load_s,
            pid=os.getpid(),
        )

    async def _follow_statistics(self, loaded: LoadedLLM) -> None:
        """Take every iteration's statistics while there are requests."""
        try:
            while True:
                await self._some_open.wait()
                # It ends after a silence, and then at once until something new is submitted.
                async for iteration in loaded.llm.get_stats_async(timeout=_STATISTICS_TIMEOUT_S):
                    self._heard_something = True
                    self._statistics.iteration(iteration)
                await asyncio.sleep(_STATISTICS_PAUSE_S)
        except Exception as error:  # requests are served without them
            logger.warning("TensorRT-LLM gives no statistics any more: %s", error)

    async def _watch(self) -> None:
        """Declare the engine dead once requests have been open for ``stall_timeout_s`` without a
        sign of progress. It counts its own ticks, so that this process's being stopped or busy is
        not held against the engine.
        """
        tick_s = min(1.0, self._config.stall_timeout_s / 4)
        silent_s = 0.0
        while True:
            await asyncio.sleep(tick_s)
            silent = bool(self._open) and not self._heard_something
            silent_s = silent_s + tick_s if silent else 0.0
            self._heard_something = False
            if silent_s < self._config.stall_timeout_s:
                continue
            if not all(entry.aborted for entry in self._open.values()):
                stall_s = self._config.stall_timeout_s
                self._die(f"TensorRT-LLM made no progress for {stall_s:g} s")
                return
            # Only the confirmation of aborts is missing: nothing is lost by going on without.
            for entry in list(self._open.values()):
                request_id = entry.request.request_id
                logger.warning("TensorRT-LLM did not confirm that %s was aborted", request_id)
                self._end(entry, _aborted(entry))
                _cancel(entry.task)

    def _die(self, reason: str) -> None:
        """Fail every open request and serve no more."""
        if self._loaded is None:
            return
        self._loaded = None
        if not self._closing:
            self._health = Health(False, f"{reason}; start the server again")
        logger.error("%s; %d open requests failed", reason, len(self._open))
        for entry in list(self._open.values()):
            self._end(entry, EngineDeadError(f"{reason}; the request may be sent again"))
            _cancel(entry.task)
        for task in self._background:
            _cancel(task)
        # Frees its GPUs where it still can.
        self._burial = self._burial or asyncio.create_task(self._shut_llm_down())

    async def _bury(self) -> None:
        """Shut the LLM down, once, and wait for it."""
        self._burial = self._burial or asyncio.create_task(self._shut_llm_down())
        await asyncio.shield(self._burial)

    async def _shut_llm_down(self) -> None:
        """Shut the LLM down; give up on one that hangs."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        try:
            await asyncio.wait_for(in_thread(llm.shutdown), _SHUTDOWN_TIMEOUT_S)
        except TimeoutError:
            logger.error("TensorRT-LLM did not shut down in %g s", _SHUTDOWN_TIMEOUT_S)
        except Exception as error:  # it is going anyway
            logger.error("TensorRT-LLM did not shut down cleanly: %s", error)


def _aborted(entry: _OpenRequest) -> Output:
    return Output(request_id=entry.request.request_id, finish_reason=FinishReason.ABORT)


def _cancel(task: asyncio.Task[None] | None) -> None:
    """Cancel a task, unless it is the one that asks."""
    if task is not None and task is not asyncio.current_task():
        task.cancel()


async def _stop(tasks: Iterable[asyncio.Task[None] | None]) -> None:
    """Cancel tasks and wait until they have ended."""
    running = {task for task in tasks if task is not None}
    while running:
        for task in running:
            task.cancel()
        # Again if need be: Python 3.11's wait_for, which TensorRT-LLM's queues use, can lose one.
        _, running = await asyncio.wait(running, timeout=_CANCEL_AGAIN_S)
