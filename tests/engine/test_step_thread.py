"""The thread that executes steps, on a runner that only says what it was told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from llmserve.core.step import ModelRunnerOutput, SchedulerOutput
from llmserve.engine.step_thread import StepThread
from llmserve.runtime.model_runner import TokenMasks


class Runner:
    """Writes down what it is asked for and where."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.events: list[str] = []
        self.threads: set[int] = set()
        self.launched = threading.Event()

    def _note(self, event: str) -> None:
        self.events.append(event)
        self.threads.add(threading.get_ident())

    def launch(self, step: SchedulerOutput) -> int:
        self._note(f"launch {step.step_id}")
        self.launched.set()
        if step.step_id == self.fail_at:
            raise RuntimeError("out of luck")
        return step.step_id

    def finish(self, handle: int, masks: TokenMasks | None = None) -> ModelRunnerOutput:
        self._note(f"finish {handle} {sorted(masks or {})}")
        return ModelRunnerOutput(token_ids={"a": [handle]})

    def shutdown(self) -> None:
        self._note("shutdown")


def start(runner: Runner, on_done: Callable[[], None] = lambda: None) -> StepThread:
    return StepThread(runner, on_done)  # type: ignore[arg-type]


def test_steps_are_executed_in_order_and_in_one_other_thread() -> None:
    runner, rings = Runner(), []
    thread = start(runner, lambda: rings.append(threading.get_ident()))
    first, second = (thread.submit(SchedulerOutput(step_id=i)) for i in range(2))
    second.set_masks({})
    time.sleep(0.02)
    # The first computes without its masks, and nothing overtakes it.
    assert runner.events == ["launch 0"]
    assert not first.is_done
    first.set_masks({"a": np.zeros(1, np.int32)})
    assert first.result().token_ids == {"a": [0]}
    assert second.result().token_ids == {"a": [1]}
    assert second.is_done
    assert thread.call(threading.get_ident) != threading.get_ident()
    thread.shutdown()
    assert runner.events == ["launch 0", "finish 0 ['a']", "launch 1", "finish 1 []", "shutdown"]
    assert len(runner.threads) == 1
    assert rings == [*runner.threads] * 2


def test_waiting_for_masks_is_not_the_models_time() -> None:
    thread = start(Runner())
    step = thread.submit(SchedulerOutput(step_id=0))
    time.sleep(0.05)
    step.set_masks({})
    step.result()
    thread.shutdown()
    assert 0 < step.model_s < 0.03


def test_after_a_failure_nothing_is_computed_any_more() -> None:
    runner, rings = Runner(fail_at=1), []
    thread = start(runner, lambda: rings.append(1))
    steps = [thread.submit(SchedulerOutput(step_id=i)) for i in range(3)]
    for step in steps:
        step.set_masks({})
    steps[0].result()
    for step in steps[1:]:
        with pytest.raises(RuntimeError, match="out of luck"):
            step.result()
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0)
    thread.shutdown()
    assert runner.events == ["launch 0", "finish 0 []", "launch 1", "shutdown"]
    assert len(rings) == 3


def test_a_hanging_step_keeps_no_process_from_its_end() -> None:
    runner = Runner()
    start(runner).submit(SchedulerOutput(step_id=0))  # its masks never come
    assert runner.launched.wait(5)
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "steps")
