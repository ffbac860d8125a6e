"""What a test wants the stand-in to do wrong, and what it has seen. Reset with each import."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any


def is_engine_generation() -> bool:
    """Whether this is a 1.2 or older."""
    major, minor = version("tensorrt-llm").split(".")[:2]
    return (int(major), int(minor)) < (1, 3)


@dataclass
class Behaviour:
    """Set before or while the LLM runs.

    Attributes:
        step_s: Pause before every step.
        tokens_per_step: Tokens of a request that one step brings, as speculation does.
        request_errors: Prompt -> message: that request fails with RequestError at its second step.
        load_error: LLM() raises it.
        die_at_step: From this step on, counted from 0, the executor fails with a background error.
        lose_aborts: An aborted request just stops: 'cancelled' never comes.
        running: While it is cleared no step is made, and shutdown does not return.
        finish_reason: Replaces the reason of every request that reaches its length.
        llms: Every LLM made.
        submitted: (inputs, sampling params, cache_salt) of every request taken.
    """

    step_s: float = 0.0
    tokens_per_step: int = 1
    request_errors: dict[tuple[int, ...], str] = field(default_factory=dict)
    load_error: Exception | None = None
    die_at_step: int | None = None
    lose_aborts: bool = False
    running: threading.Event = field(default_factory=threading.Event)
    finish_reason: str = "length"
    llms: list[Any] = field(default_factory=list)
    submitted: list[tuple[list[int], Any, str | None]] = field(default_factory=list)


behaviour = Behaviour()
behaviour.running.set()
