"""Answers a job's open lines: at most N at a time, each durable before it counts as done.

A request's own fault is an answer like any other. Only what the engine could not do for reasons of
its own (503: dead, overloaded) is tried again: first in place with a growing pause, then, once all
other lines are done, alone. A line with which the engine dies even then is the one that kills it,
and that is its answer. An engine that does not come back ends the run, which can be resumed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from llmserve.batch.format import Answer, BatchInput, InputLine, JsonObject, Response, seed_of
from llmserve.batch.journal import Journal
from llmserve.errors import EngineDeadError

# The one status that says nothing about the request: the engine is dead, overloaded or leaving.
_UNAVAILABLE = 503
# Tries of a line beside others before it has to wait for a turn alone.
_TRIES = 3


class Responder(Protocol):
    """What answers a request: the API without HTTP."""

    @property
    def max_batch_size(self) -> int:
        """Most requests that the engine computes in one step."""
        ...

    async def respond(self, url: str, body: JsonObject, request_id: str) -> Response:
        """Answer one request with the status and body that HTTP would have; raises nothing."""
        ...

    async def ready(self) -> bool:
        """Whether the engine serves."""
        ...


class Progress(Protocol):
    """Who is told about finished lines."""

    def advance(self, answer: Answer) -> None:
        """A line is done and durable."""
        ...


class Runner:
    """Runs the open lines of one job.

    Args:
        jobs: The checked input.
        journal: The job's journal, bound; lines with an entry are left out.
        responder: What answers.
        progress: Told of each line that is done.
        concurrency: Most lines in flight.
        retry_pause_s: The first pause after an engine's fault; it doubles with every try.
        engine_timeout_s: How long a dead engine may take to come back.
    """

    def __init__(
        self,
        jobs: BatchInput,
        journal: Journal,
        responder: Responder,
        progress: Progress,
        *,
        concurrency: int,
        retry_pause_s: float = 1.0,
        engine_timeout_s: float = 600.0,
    ) -> None:
        self._jobs = jobs
        self._journal = journal
        self._responder = responder
        self._progress = progress
        self._concurrency = concurrency
        self._retry_pause_s = retry_pause_s
        self._engine_timeout_s = engine_timeout_s
        self._open = deque(line for line in jobs.lines if line.custom_id not in journal.entries)
        self._suspects: list[InputLine] = []
        # None ends the recording.
        self._answers: asyncio.Queue[Answer | None] = asyncio.Queue()

    async def run(self) -> None:
        """Answer the open lines until all are done.

        Cancelled, it gives up the lines in flight and records what has its answer.

        Raises:
            BatchJournalError: The journal can't be written.
            EngineDeadError: The engine did not come back.
            BatchInputError: The input file changed meanwhile.
        """
        answering = asyncio.create_task(self._answer_all())
        recording = asyncio.create_task(self._record_all())
        try:
            await asyncio.wait((answering, recording), return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Whatever ended it, the same way down: no new answers, then record what is there.
            await _settle(answering)
            self._answers.put_nowait(None)
            await asyncio.shield(recording)
        answering.result()

    async def _answer_all(self) -> None:
        workers = [
            asyncio.create_task(self._work())
            for _ in range(min(self._concurrency, len(self._open)))
        ]
        try:
            # The first error ends the run as it is: a TaskGroup would wrap it.
            await asyncio.gather(*workers)
        finally:
            await _settle(*workers)
        for line in self._suspects:
            self._answers.put_nowait(await self._answer_alone(line))

    async def _work(self) -> None:
        while self._open:
            line = self._open.popleft()
            answer = await self._answer(line)
            if answer is None:
                self._suspects.append(line)
            else:
                self._answers.put_nowait(answer)

    async def _answer(self, line: InputLine) -> Answer | None:
        """The answer, or None if the engine could not give one."""
        for attempt in range(_TRIES):
            response = await self._respond(line)
            if response.status_code != _UNAVAILABLE:
                return self._to_answer(line, response)
            await asyncio.sleep(self._retry_pause_s * (1 << attempt))
            await self._engine_back()
        return None

    async def _answer_alone(self, line: InputLine) -> Answer:
        """The answer to a line that runs by itself: if the engine dies now, the line did it."""
        await self._engine_back()
        return self._to_answer(line, await self._respond(line))

    async def _respond(self, line: InputLine) -> Response:
        body = self._jobs.body(line)
        if body.get("seed") is None:
            # A seed drawn at random would make a resumed job differ from an undisturbed one.
            body["seed"] = seed_of(line.custom_id)
        return await self._responder.respond(line.url, body, self._jobs.request_id(line))

    def _to_answer(self, line: InputLine, response: Response) -> Answer:
        return Answer.from_response(line.custom_id, self._jobs.request_id(line), response)

    async def _engine_back(self) -> None:
        """Wait until the engine serves; raises EngineDeadError if it doesn't in time."""
        try:
            async with asyncio.timeout(self._engine_timeout_s):
                while not await self._responder.ready():  # noqa: ASYNC110
                    await asyncio.sleep(self._retry_pause_s)
        except TimeoutError:
            raise EngineDeadError(
                f"the engine did not come back within {self._engine_timeout_s:.0f} s; "
                f"{len(self._journal.entries)} answers are safe: run the same command again"
            ) from None

    async def _record_all(self) -> None:
        """Make answers durable as they come: all that wait go to disk in one write."""
        more = True
        while more:
            waiting = [await self._answers.get()]
            while not self._answers.empty():
                waiting.append(self._answers.get_nowait())
            answers = [answer for answer in waiting if answer is not None]
            more = len(answers) == len(waiting)
            if answers:
                # In a thread: a slow disk must not hold up the streams of the engine.
                await asyncio.to_thread(self._journal.append, answers)
                for answer in answers:
                    self._progress.advance(answer)


async def _settle(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks and wait until each is done; their results and errors stay in them."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
