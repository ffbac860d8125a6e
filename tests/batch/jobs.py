"""Jobs files, and a responder whose answers are known beforehand."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from llmserve.batch.format import JsonObject, Response
from llmserve.batch.job import BatchJob

MODEL = "demo"


def chat_line(custom_id: str, content: str = "hello", **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": MODEL, "messages": messages, **body},
    }


def write_jobs(path: Path, lines: Sequence[dict[str, Any] | str | bytes]) -> Path:
    """A jobs file; a line that is text or bytes goes in as it is."""
    with path.open("wb") as file:
        for line in lines:
            if isinstance(line, dict):
                line = json.dumps(line, ensure_ascii=False)
            file.write((line.encode() if isinstance(line, str) else line) + b"\n")
    return path


def make_job(directory: Path, **changes: Any) -> BatchJob:
    settings: dict[str, Any] = {
        "input_path": directory / "jobs.jsonl",
        "output_path": directory / "answers.jsonl",
        "error_path": directory / "errors.jsonl",
        "served_model_name": MODEL,
        "settings": {"the model": "sha256:0"},
        "concurrency": 4,
        "retry_pause_s": 0.0,
        "engine_timeout_s": 1.0,
    }
    return BatchJob(**{**settings, **changes})


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer_to(body: JsonObject) -> Response:
    """What every fake answers: it depends on the whole body, the seed included."""
    return Response(200, {"echo": body, "usage": {"completion_tokens": 3}})


Behave = Callable[[JsonObject, int], Response | None]


class FakeResponder:
    """Answers ``answer_to(body)``.

    Args:
        behave: (body, how many tries of it before this one) -> another response; it may raise.
        delays_s: Seconds for the first, second, ... request; then none.
        dead: What ``ready`` tells.

    Attributes:
        submissions: How often each custom_id was submitted, by the chat's text.
        most_in_flight: The highest number of requests at once.
    """

    def __init__(
        self, behave: Behave | None = None, delays_s: Sequence[float] = (), dead: bool = False
    ) -> None:
        self.behave = behave
        self.delays_s = list(delays_s)
        self.dead = dead
        self.submissions: Counter[str] = Counter()
        self.most_in_flight = 0
        self.in_flight = 0
        self.max_batch_size = 8

    async def respond(self, url: str, body: JsonObject, request_id: str) -> Response:
        name = json.dumps(body)
        tries = self.submissions[name]
        self.submissions[name] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.delays_s.pop(0) if self.delays_s else 0)
            response = self.behave(body, tries) if self.behave is not None else None
            return response or answer_to(body)
        finally:
            self.in_flight -= 1

    async def ready(self) -> bool:
        return not self.dead

    @contextlib.asynccontextmanager
    async def __call__(self) -> AsyncIterator[FakeResponder]:
        """Stands for ``open_responder``."""
        yield self
