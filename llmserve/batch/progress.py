"""How far a job is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import NoReturn, TextIO

from tqdm import tqdm

from llmserve.batch.format import Answer

_LINE_INTERVAL_S = 10.0


class BatchProgress:
    """Counts finished lines and tells a person. A context manager.

    Args:
        total: Lines of the job.
        done: Lines that earlier runs have finished, failed ones included.
        failed: Of those, the failed ones.
        stream: Where to write; standard error if None.
    """

    def __init__(self, total: int, done: int, failed: int, stream: TextIO | None = None) -> None:
        self.total = total
        self.done = done
        self.failed = failed
        self._stream = stream or sys.stderr
        self._done_before = done
        self._completion_tokens = 0
        self._start_s = self._last_line_s = time.monotonic()
        self._bar: tqdm[NoReturn] | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=done, unit="line", file=self._stream, dynamic_ncols=True
            )
            self._bar.set_postfix_str(self._figures(), refresh=True)

    def advance(self, answer: Answer) -> None:
        """Count a line that is done and durable."""
        self.done += 1
        self.failed += answer.failed
        self._completion_tokens += answer.completion_tokens
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures(), refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last_line_s >= _LINE_INTERVAL_S:
            self._print_line()

    def _figures(self) -> str:
        elapsed_s = max(time.monotonic() - self._start_s, 1e-9)
        return f"{self.failed} failed, {self._completion_tokens / elapsed_s:.0f} tok/s"

    def _print_line(self) -> None:
        self._last_line_s = time.monotonic()
        rate = (self.done - self._done_before) / max(self._last_line_s - self._start_s, 1e-9)
        left = ""
        if rate and self.done < self.total:
            left = f", {tqdm.format_interval((self.total - self.done) / rate)} left"
        print(
            f"{self.done}/{self.total} lines, {self._figures()}{left}",
            file=self._stream,
            flush=True,
        )

    def __enter__(self) -> BatchProgress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._print_line()
