"""The native engine in a process of its own, watched: ``Engine`` for asyncio programs.

It owns the open requests, the process's life and its restarts. It computes nothing and imports no
torch: a fault in there ends that process and never this one.

    submit --> Submit ----------------------> engine process (``worker.py``)
    OutputStream <-- Progress, Refused <-----'    dies: every open stream raises EngineDeadError,
                                                  a new process is started after a pause

A stream that is left early stays in the books until the engine confirms the request's end, so that
its id is not taken twice and ``shutdown`` knows what still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

from llmserve.config import EngineConfig
from llmserve.core.request import FinishReason, Output, Request
from llmserve.core.stats import EngineStats
from llmserve.engine.admission import check_request
from llmserve.engine.engine import Health
from llmserve.engine.lifecycle import EngineLifecycle
from llmserve.engine.messages import Abort, Failed, Hello, Progress, Ready, Refused
from llmserve.engine.runner_spec import RunnerSpec, TorchRunnerSpec
from llmserve.engine.worker_process import WorkerProcess
from llmserve.errors import (
    EngineDeadError,
    InvalidRequestError,
    LlmserveError,
)

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.25
_LONGEST_BACKOFF_S = 30.0
_COMPUTING_SHARE = 0.1  # of a core; what only waits takes next to nothing
_HEALTHY_AFTER_S = 30.0  # an engine that lived this long starts the back-off afresh

_Queue: TypeAlias = "asyncio.Queue[Output | LlmserveError]"


class OutputStream(AsyncIterator[Output]):
    """The outputs of one request. The last one has a finish_reason.

    Cancelling the wait for an output, ``aclose`` and dropping the stream all abort the request.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, queue: _Queue, leave: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._queue = queue
        self._leave = leave
        self._ended = False

    async def __anext__(self) -> Output:
        if self._ended:
            raise StopAsyncIteration
        try:
            item = await self._queue.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(item, LlmserveError):
            self._ended = True
            raise item
        self._ended = item.finish_reason is not None
        return item

    async def aclose(self) -> None:
        """Abort the request, if it still runs. Safe to call twice."""
        if not self._ended:
            self._ended = True
            self._leave()

    def __del__(self) -> None:
        # ``break`` in an ``async for`` calls no aclose, and garbage is collected on any thread.
        if not self._ended:
            with contextlib.suppress(RuntimeError):  # the loop has closed, and the engine with it
                self._loop.call_soon_threadsafe(self._leave)


class ProcessEngine(EngineLifecycle):
    """The native engine behind the ``Engine`` protocol. All methods belong to one event loop.

    Args:
        engine_dir: What ``llmserve build`` wrote.
        config: What to start it with.
        runner: What computes in the process; tests put a fake one here.
    """

    def __init__(
        self,
        engine_dir: Path,
        config: EngineConfig | None = None,
        *,
        runner: RunnerSpec | None = None,
    ) -> None:
        super().__init__(config)
        self._runner = runner or TorchRunnerSpec(str(engine_dir))
        # Open requests; None in place of a queue once nobody listens any more.
        self._queues: dict[str, _Queue | None] = {}
        self._stats = EngineStats()
        self._worker: WorkerProcess | None = None  # set while it serves
        self._supervisor: asyncio.Task[None] | None = None

    # --- the Engine protocol --------------------------------------------------------------------

    def submit(self, request: Request) -> OutputStream:
        """Queue a request; see ``Engine.submit``. What only the process can tell (its queue has
        filled meanwhile) is raised from the stream instead.
        """
        worker = self._serving_worker()
        message = worker.pack(request)  # first, for what follows trusts its types
        check_request(request, worker.info)
        if request.request_id in self._queues:
            raise InvalidRequestError(f"request_id {request.request_id!r} is in use already")
        # The number running is a moment old; the process has the last word.
        queued = len(self._queues) - self._stats.num_running_requests
        self._check_queue(queued)
        worker.send_packed(message)
        if not self._queues:
            self._heard_something = True  # the silence so far was idleness
            self._none_open.clear()
        queue: _Queue = asyncio.Queue()
        self._queues[request.request_id] = queue
        leave = partial(self._leave, request.request_id, queue)
        return OutputStream(worker.loop, queue, leave)

    async def abort(self, request_id: str) -> None:
        """End a request with finish reason ABORT. Unknown ids are ignored."""
        if self._worker is not None and request_id in self._queues:
            self._worker.send(Abort(request_id))

    async def stats(self) -> EngineStats:
        """The latest snapshot: at most 0.1 s and one step old, and exact when idle."""
        return self._stats

    async def shutdown(self, *, drain_s: float = 0.0) -> None:
        """Refuse new requests, let open ones end for up to ``drain_s`` seconds, abort the rest and
        end the process. Safe to call twice, and to call again if the first call was cancelled.
        """
        self._closing = True
        self._health = Health(False, "the engine is shutting down")
        async with self._shutdown_lock:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._none_open.wait(), drain_s)
            for request_id in list(self._queues):
                self._put(Output(request_id=request_id, finish_reason=FinishReason.ABORT))
            for task in (self._starting, self._supervisor):
                if task is not None:
                    task.cancel()
                    await asyncio.wait({task})
            if self._worker is not None:
                await self._worker.stop()
                self._worker = None
            self._health = Health(False, "the engine has shut down")

    # --- requests -------------------------------------------------------------------------------

    def _serving_worker(self) -> WorkerProcess:
        self._check_serves(alive=self._worker is not None)
        assert self._worker is not None
        return self._worker

    def _leave(self, request_id: str, queue: _Queue) -> None:
        """Nobody listens to this queue any more."""
        if self._queues.get(request_id) is queue:
            self._queues[request_id] = None
            if self._worker is not None:
                self._worker.send(Abort(request_id))

    def _put(self, output: Output) -> None:
        """Hand an output to whoever listens; the last one closes the books on its request."""
        if output.finish_reason is not None:
            self._end(output.request_id, output)
        else:
            queue = self._queues.get(output.request_id)
            if queue is not None:
                queue.put_nowait(output)

    def _end(self, request_id: str, last: Output | LlmserveError) -> None:
        queue = self._queues.pop(request_id, None)
        if queue is not None:
            queue.put_nowait(last)
        if not self._queues:
            self._none_open.set()

    # --- the process ----------------------------------------------------------------------------

    async def _load(self) -> None:
        worker = await WorkerProcess.start(self._runner, self._config)
        self._enter_service(worker)
        self._supervisor = asyncio.create_task(self._supervise(worker))

    async def _supervise(self, worker: WorkerProcess) -> None:
        """Serve with one process after the other, until cancelled."""
        loop = asyncio.get_running_loop()
        backoff_s = _FIRST_BACKOFF_S
        while True:
            begun_s = loop.time()
            reason = await self._serve(worker)
            self._leave_service(reason)
            await worker.kill()
            if loop.time() - begun_s >= _HEALTHY_AFTER_S:
                backoff_s = _FIRST_BACKOFF_S
            worker, backoff_s = await self._restart(backoff_s)
            self._enter_service(worker)
            logger.warning("the engine is back; it took %.1f s to load", worker.info.load_s)

    async def _restart(self, backoff_s: float) -> tuple[WorkerProcess, float]:
        """Start a new process after a pause, and again after longer ones; also the next pause."""
        while True:
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
            try:
                return await WorkerProcess.start(self._runner, self._config), backoff_s
            except Exception as error:  # whatever it is, it may be gone next time
                reason = f"the engine could not start again: {error}"
                logger.error("%s; trying once more in %g s", reason, backoff_s)
                if not self._closing:
                    self._health = Health(False, reason)

    def _enter_service(self, worker: WorkerProcess) -> None:
        self._worker = worker
        self._info, self._stats = worker.info, worker.stats
        if not self._closing:
            self._health = Health(True)

    def _leave_service(self, reason: str) -> None:
        self._worker = None
        self._stats = EngineStats()
        if not self._closing:
            self._health = Health(False, f"{reason}; it is being restarted")
        logger.error("%s; %d open requests failed", reason, len(self._queues))
        for request_id in list(self._queues):
            self._end(request_id, EngineDeadError(f"{reason}; the request may be sent again"))

    async def _serve(self, worker: WorkerProcess) -> str:
        """Hand out what the process sends until it fails, dies or hangs; return which."""
        ends = [
            asyncio.create_task(self._receive(worker)),
            asyncio.create_task(self._wait_for_exit(worker)),
            asyncio.create_task(self._watch(worker)),
        ]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return next(end for end in ends if end in done).result()
        except Exception as error:  # whatever it is, no stream is left hanging
            logger.exception("the engine process cannot be understood")
            return f"the engine process cannot be understood ({error})"
        finally:
            for end in ends:
                end.cancel()
            await asyncio.wait(ends)

    async def _receive(self, worker: WorkerProcess) -> str:
        while True:
            match await worker.receive():
                case Progress(outputs, stats):
                    if stats is not None:
                        # Only a step that has ended is progress: who answers aborts need not be who
                        # computes.
                        self._heard_something |= stats.num_steps > self._stats.num_steps
                        self._stats = stats
                    for output in outputs:
                        self._put(output)
                case Refused(request_id, error):
                    self._end(request_id, error.to_exception())
                case Failed(error):
                    return f"the engine failed: {error.message}"
                case Hello() | Ready():
                    raise AssertionError("a worker is started once")

    async def _wait_for_exit(self, worker: WorkerProcess) -> str:
        return f"the engine process {await worker.wait()}"

    async def _watch(self, worker: WorkerProcess) -> str:
        """Return once requests have been open for ``stall_timeout_s`` without a sign of progress.

        Steps that end are such signs, and on a CPU that something computes: a step of many prompt
        tokens may take minutes. (Who waits for a GPU may do so in a loop, so there it proves
        nothing.) Counts its own ticks, so that this process's being stopped or busy is not held
        against the engine.
        """
        tick_s = min(1.0, self._config.stall_timeout_s / 4)
        silent_s = compute_s = 0.0
        while silent_s < self._config.stall_timeout_s:
            await asyncio.sleep(tick_s)
            before_s, compute_s = compute_s, worker.compute_s()
            share = (compute_s - before_s) / tick_s
            computes = worker.info.device == "cpu" and share >= _COMPUTING_SHARE
            silent = bool(self._queues) and not (self._heard_something or computes)
            silent_s = silent_s + tick_s if silent else 0.0
            self._heard_something = False
        return f"the engine made no progress for {self._config.stall_timeout_s:g} s and was killed"
