"""How long work on files tells how far it is. Who shows it, and how, is not known here."""

from __future__ import annotations

from typing import Protocol


class Report(Protocol):
    """Called after every tensor that was written."""

    def __call__(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        """Take note that ``done_bytes`` of ``total_bytes`` of a stage ('convert') are written."""
        ...


def no_report(stage: str, done_bytes: int, total_bytes: int) -> None:
    """Say nothing."""
