"""What happens to requests, for whoever counts: the server's metrics implement this protocol."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llmserve.llm import CompletionOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerTimes:
    """One ended answer, in seconds since its request arrived.

    Attributes:
        finish_reason: stop, length, timeout, abort or error.
        prompt_tokens: Of its prompt.
        generation_tokens: Of the answer.
        queue_s: Waiting for the first step.
        first_token_s: None if there was no token.
        end_s: Until the last token, or the abort.
    """

    finish_reason: str
    prompt_tokens: int
    generation_tokens: int
    queue_s: float
    first_token_s: float | None
    end_s: float


class RequestObserver(Protocol):
    """Is told as things happen; must not block."""

    def first_token(self, ttft_s: float) -> None:
        """An answer's first token came, so many seconds after its request."""
        ...

    def next_tokens(self, itl_s: float) -> None:
        """More tokens of an answer came, so many seconds per token after the ones before."""
        ...

    def finished(self, times: AnswerTimes) -> None:
        """An answer ended."""
        ...


class SilentObserver:
    """Tells nobody."""

    def first_token(self, ttft_s: float) -> None:
        """Do nothing."""

    def next_tokens(self, itl_s: float) -> None:
        """Do nothing."""

    def finished(self, times: AnswerTimes) -> None:
        """Do nothing."""


class AnswerClock:
    """Takes the times of the n answers to one prompt.

    Args:
        observer: Is told.
        n: Answers to this prompt.
        prompt_tokens: Of this prompt.
        arrival_s: On ``time.perf_counter``.
    """

    def __init__(
        self, observer: RequestObserver, n: int, prompt_tokens: int, arrival_s: float
    ) -> None:
        self._observer = observer
        self._prompt_tokens = prompt_tokens
        self._arrival_s = arrival_s
        self._first_s: list[float | None] = [None] * n
        self._last_s = [arrival_s] * n
        self._num_tokens = [0] * n
        self._open = set(range(n))
        self._queue_s = 0.0

    def update(self, outputs: Sequence[CompletionOutput], queue_s: float) -> None:
        """Note what a step brought."""
        now_s = time.perf_counter()
        self._queue_s = queue_s
        for output in outputs:
            index = output.index
            if index not in self._open:
                continue
            if num_new := len(output.token_ids_diff):
                if self._first_s[index] is None:
                    self._first_s[index] = now_s
                    self._observer.first_token(now_s - self._arrival_s)
                else:
                    self._observer.next_tokens((now_s - self._last_s[index]) / num_new)
                self._last_s[index] = now_s
                self._num_tokens[index] += num_new
            if output.finish_reason is not None:
                self._end(index, output.finish_reason, now_s)

    def close(self, finish_reason: str) -> None:
        """End the answers that are still open: an abort, a timeout or an error."""
        for index in sorted(self._open):
            self._end(index, finish_reason, time.perf_counter())

    def _end(self, index: int, finish_reason: str, now_s: float) -> None:
        self._open.discard(index)
        first_s = self._first_s[index]
        self._observer.finished(
            AnswerTimes(
                finish_reason=finish_reason,
                prompt_tokens=self._prompt_tokens,
                generation_tokens=self._num_tokens[index],
                queue_s=self._queue_s,
                first_token_s=None if first_s is None else first_s - self._arrival_s,
                end_s=now_s - self._arrival_s,
            )
        )
