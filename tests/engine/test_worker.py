"""The worker's loop, with nothing real on either side of it."""

from __future__ import annotations

from typing import Any

from llmserve.core.request import FinishReason, Output
from llmserve.core.stats import EngineStats
from llmserve.engine.messages import Abort, Progress, Refused, Stop, Submit
from llmserve.engine.worker import Worker
from llmserve.errors import EngineOverloadedError
from tests.engine.factories import make_request

STEP_ENDS = "a step ends"
NOTHING = "nothing happens"


class Script:
    """A parent, and a core in one: what happens in each wait is written down beforehand.

    ``STEP_ENDS`` ends one request, ``NOTHING`` is a wait that was for nothing, anything else a
    message that comes during the wait.
    """

    def __init__(self, *waits: Any) -> None:
        self.waits = list(waits)
        self.inbox: list[Any] = []
        self.events: list[str] = []
        self.running: list[str] = []
        self.expired: list[Output] = []
        self.done = False

    # The parent.

    def receive(self) -> Any:
        return self.inbox.pop(0) if self.inbox else None

    def wait(self, timeout_s: float) -> bool:
        happens = self.waits.pop(0)
        if happens is STEP_ENDS:
            self.done = True
        elif isinstance(happens, Output):
            self.expired.append(happens)
        elif happens is not NOTHING:
            self.inbox.append(happens)
        return happens is not NOTHING

    def send(self, message: Any) -> None:
        if isinstance(message, Refused):
            self.events.append(f"{message.request_id} refused")
            return
        assert isinstance(message, Progress)
        # Exact when the last has ended.
        assert message.stats is not None or self.running
        self.events += [f"{o.request_id} {o.finish_reason}" for o in message.outputs]

    # The core.

    def add_request(self, request: Any) -> None:
        if len(self.running) == 2:
            raise EngineOverloadedError("two are enough")
        self.running.append(request.request_id)

    def abort_request(self, request_id: str) -> Output | None:
        if request_id not in self.running:
            return None
        self.running.remove(request_id)
        return Output(request_id, finish_reason=FinishReason.ABORT)

    def expire_requests(self) -> list[Output]:
        expired, self.expired = self.expired, []
        for output in expired:
            self.running.remove(output.request_id)
        return expired

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def launch(self) -> None:
        pass

    def step_is_under_way(self) -> bool:
        return bool(self.running)

    def step_is_done(self) -> bool:
        return self.done

    def collect(self) -> list[Output]:
        self.done = False
        return [Output(self.running.pop(0), finish_reason=FinishReason.LENGTH)]

    def stats(self) -> EngineStats:
        return EngineStats()

    def check_integrity(self) -> None:
        assert not self.running
        self.events.append("books checked")

    def prepare(self) -> None:
        self.events.append("prepared")


def run(*waits: Any) -> list[str]:
    script = Script(*waits, Stop())
    Worker(script, script).run()  # type: ignore[arg-type]
    assert script.waits == []
    return script.events


def submit(index: int) -> Submit:
    return Submit(make_request(index))


def test_the_books_are_checked_once_where_nobody_waits_for_it() -> None:
    events = run(submit(1), STEP_ENDS, NOTHING, NOTHING, submit(2), STEP_ENDS, NOTHING)
    pause = ["books checked", "prepared"]
    assert events == ["request-1 length", *pause, "request-2 length", *pause]


def test_the_parent_is_heard_while_a_step_runs() -> None:
    events = run(submit(1), NOTHING, submit(2), submit(3), Abort("request-1"), STEP_ENDS)
    assert events == ["request-3 refused", "request-1 abort", "request-2 length"]


def test_a_timeout_waits_for_no_step() -> None:
    timeout = Output("request-1", finish_reason=FinishReason.TIMEOUT)
    assert run(submit(1), submit(2), timeout, STEP_ENDS) == [
        "request-1 timeout",
        "request-2 length",
    ]


def test_stop_waits_for_no_request() -> None:
    assert run(submit(1)) == []
