from __future__ import annotations

import io

import pytest

from llmserve.batch import progress
from llmserve.batch.format import Answer
from llmserve.batch.progress import BatchProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


GOOD, BAD = Answer("a", False, b"{}", 40), Answer("b", True, b"{}", 2)


def test_on_a_terminal_it_is_a_bar() -> None:
    terminal = Terminal()
    with BatchProgress(10, 3, 1, terminal) as report:
        report.advance(GOOD)
        report.advance(BAD)
    last = terminal.getvalue().split("\r")[-1]
    assert "5/10" in last
    assert "2 failed" in last
    assert "tok/s" in last


def test_elsewhere_it_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    with BatchProgress(10, 3, 0, stream) as report:
        clock[0] = 105.0
        report.advance(GOOD)
        assert stream.getvalue() == ""
        clock[0] = 110.0
        report.advance(BAD)
        # 42 tokens and 2 of this run's lines in 10 s; 5 lines are left.
        assert stream.getvalue() == "5/10 lines, 1 failed, 4 tok/s, 00:25 left\n"
        clock[0] = 112.0
        for _ in range(5):
            report.advance(GOOD)
    assert stream.getvalue().splitlines()[1:] == ["10/10 lines, 1 failed, 20 tok/s"]
