"""The worker's loop, with nothing real on either side of it."""

from __future__ import annotations

from typing import Any

from llmserve.core.request import FinishReason, Output
from llmserve.core.stats import EngineStats
from llmserve.engine.messages import Progress, Stop, Submit
from llmserve.engine.worker import Worker
from tests.engine.factories import make_request


class Script:
    """A parent that says these things one after the other, and a core that needs a step for each.

    ``None`` is a second in which nothing was said.
    """

    def __init__(self, *messages: Any) -> None:
        self.messages = list(messages)
        self.events: list[str] = []
        self.running: list[str] = []

    def receive(self, *, wait: bool) -> Any:
        return self.messages.pop(0) if wait else None

    def send(self, message: Any) -> None:
        assert isinstance(message, Progress)
        assert message.stats is not None
        self.events.append(f"{len(message.outputs)} sent")

    def add_request(self, request: Any) -> None:
        self.running.append(request.request_id)

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def step(self) -> list[Output]:
        return [Output(request_id=self.running.pop(), finish_reason=FinishReason.LENGTH)]

    def stats(self) -> EngineStats:
        return EngineStats()

    def check_integrity(self) -> None:
        self.events.append("checked")


def test_the_books_are_checked_once_where_nobody_waits_for_it() -> None:
    submit = Submit(make_request(0))
    script = Script(submit, submit, None, None, submit, None, Stop())
    Worker(script, script).run()  # type: ignore[arg-type]
    assert script.events == ["1 sent", "1 sent", "checked", "1 sent", "checked"]
