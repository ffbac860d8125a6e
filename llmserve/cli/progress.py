"""Shows progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

_LINE_EVERY_PERCENT = 25


class ProgressReport:
    """A ``Report`` for people. Use as a context manager, which closes the bar.

    One stage after another may be reported: each gets its own bar, or its own lines.
    """

    def __init__(self) -> None:
        self._stage: str | None = None
        self._bar: tqdm[Any] | None = None
        self._next_percent = 0

    def __enter__(self) -> ProgressReport:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __call__(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        """Show that ``done_bytes`` of ``total_bytes`` of ``stage`` are written."""
        if stage != self._stage:
            self._start(stage, total_bytes)
        if self._bar is not None:
            self._bar.update(done_bytes - self._bar.n)
            return
        percent = 100 * done_bytes // max(total_bytes, 1)
        if percent >= self._next_percent:
            mib = f"{done_bytes / 2**20:.1f} of {total_bytes / 2**20:.1f} MiB"
            print(f"{stage}: {percent} % ({mib})", file=sys.stderr, flush=True)
            self._next_percent = percent - percent % _LINE_EVERY_PERCENT + _LINE_EVERY_PERCENT

    def _start(self, stage: str, total_bytes: int) -> None:
        self.__exit__(None, None, None)
        self._stage, self._next_percent = stage, 0
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=stage, total=total_bytes, unit="B", unit_scale=True, unit_divisor=1024
            )
