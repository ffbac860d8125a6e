"""A thread that owns the model runner and executes steps, one after the other, in their order.

Whoever drives the engine schedules step N + 1 and takes in step N - 1 while N computes::

    submit(N)    submit(N + 1)       set_masks(N + 1)
    thread:      [ launch N  finish N ][ launch N + 1 ... finish N + 1 ]
                                      ^ result of N

What a step may draw depends on the tokens of the step before, so masks come when it runs already.
It knows neither requests nor the scheduler.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from llmserve.core.step import ModelRunnerOutput, SchedulerOutput
from llmserve.runtime.model_runner import ModelRunner, TokenMasks

_T = TypeVar("_T")


class PendingStep:
    """A step on its way through the thread. Made by ``StepThread.submit``.

    Attributes:
        scheduler_output: The step.
        model_s: Seconds that the runner's two calls took, without the wait for masks; set with the
            result.
    """

    def __init__(self, scheduler_output: SchedulerOutput) -> None:
        self.scheduler_output = scheduler_output
        self.model_s = 0.0
        self._masks: Future[TokenMasks] = Future()
        self._result: Future[ModelRunnerOutput] = Future()

    @property
    def has_masks(self) -> bool:
        """Whether ``set_masks`` was called."""
        return self._masks.done()

    @property
    def is_done(self) -> bool:
        """Whether ``result`` returns, or raises, at once."""
        return self._result.done()

    def set_masks(self, masks: TokenMasks) -> None:
        """Say what may be drawn; empty for no bounds. Every step needs it once, to be finished."""
        self._masks.set_result(masks)

    def result(self) -> ModelRunnerOutput:
        """Wait for what the step brought; raises what the runner raised."""
        return self._result.result()

    def execute(self, runner: ModelRunner) -> Exception | None:
        """Compute it here and now; return what the runner raised. For the thread."""
        try:
            begun_s = time.perf_counter()
            handle = runner.launch(self.scheduler_output)
            launched_s = time.perf_counter()
            masks = self._masks.result()
            resumed_s = time.perf_counter()
            output = runner.finish(handle, masks)
            self.model_s = launched_s - begun_s + time.perf_counter() - resumed_s
        except Exception as error:
            self._result.set_exception(error)
            return error
        self._result.set_result(output)
        return None

    def fail(self, error: Exception) -> None:
        """It is not going to be computed."""
        self._result.set_exception(error)


class StepThread:
    """Executes steps on a runner, which belongs to it from here on.

    Args:
        runner: A loaded model.
        on_done: Called in the thread whenever a step's result is there.
    """

    def __init__(self, runner: ModelRunner, on_done: Callable[[], None]) -> None:
        self._runner = runner
        self._on_done = on_done
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._failure: Exception | None = None
        # A daemon, so that a step that hangs cannot keep a process from its end.
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)
        self._thread.start()

    def submit(self, scheduler_output: SchedulerOutput) -> PendingStep:
        """Queue a step; never blocks."""
        pending = PendingStep(scheduler_output)
        self._jobs.put(lambda: self._execute(pending))
        return pending

    def call(self, function: Callable[[], _T]) -> _T:
        """Run something in the thread, behind the steps that are queued, and wait for it."""
        done: Future[_T] = Future()

        def job() -> None:
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)

        self._jobs.put(job)
        return done.result()

    def shutdown(self) -> None:
        """Let the queued steps end and free the model. No call after this one."""
        self.call(self._runner.shutdown)
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _execute(self, pending: PendingStep) -> None:
        if self._failure is None:
            self._failure = pending.execute(self._runner)
        else:
            # After a step that failed nobody knows what the cache holds.
            pending.fail(self._failure)
        self._on_done()
