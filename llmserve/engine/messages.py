"""What the engine's process and its parent say to each other: msgpack of tagged structs.

The payloads are the plain dataclasses of ``llmserve.core`` and ``llmserve.config``. Between the two
processes this is all there is: neither reaches into the other any other way.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from llmserve import errors
from llmserve.config import EngineConfig
from llmserve.core.request import Output, Request
from llmserve.core.stats import EngineStats
from llmserve.engine.engine import EngineInfo
from llmserve.engine.runner_spec import RunnerSpec


class WireError(msgspec.Struct, frozen=True, kw_only=True):
    """An exception as plain data: an ``LlmserveError`` arrives as what it was.

    Attributes:
        kind: The class's name in ``llmserve.errors``; any other exception is an EngineError.
        message: A sentence for a person.
        param: Of an InvalidRequestError.
        code: Of an InvalidRequestError.
    """

    kind: str
    message: str
    param: str | None = None
    code: str | None = None

    @classmethod
    def of(cls, error: Exception) -> WireError:
        """Pack an exception."""
        if not isinstance(error, errors.LlmserveError):
            return cls(kind="EngineError", message=f"{type(error).__name__}: {error}")
        if isinstance(error, errors.InvalidRequestError):
            kind = type(error).__name__
            return cls(kind=kind, message=str(error), param=error.param, code=error.code)
        return cls(kind=type(error).__name__, message=str(error))

    def to_exception(self) -> errors.LlmserveError:
        """Unpack it."""
        kind = getattr(errors, self.kind, errors.EngineError)
        if kind is errors.InvalidRequestError:
            return errors.InvalidRequestError(self.message, param=self.param, code=self.code)
        if kind is errors.ContextLengthError:
            return errors.ContextLengthError(self.message, param=self.param)
        error = kind(self.message)
        assert isinstance(error, errors.LlmserveError)
        return error


class Start(msgspec.Struct, frozen=True, tag=True):
    """Load; the first message to a worker."""

    runner: RunnerSpec
    config: EngineConfig


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Serve this."""

    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End this with finish reason ABORT, if it still runs."""

    request_id: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Leave now, whatever runs."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Start has arrived, and loading begins: both ends are connected."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Loaded and warm."""

    info: EngineInfo
    stats: EngineStats


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The worker could not start, or a step raised; it ends after this message."""

    error: WireError


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A submitted request was not taken: there will be no output for it."""

    request_id: str
    error: WireError


class Progress(msgspec.Struct, frozen=True, tag=True):
    """What one step, an abort or a timeout brought. ``stats`` is there a few times a second while
    steps end, and whenever the last open request has ended.
    """

    outputs: list[Output]
    stats: EngineStats | None = None


ToWorker: TypeAlias = Start | Submit | Abort | Stop
FromWorker: TypeAlias = Hello | Ready | Failed | Refused | Progress
