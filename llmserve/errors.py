"""Every error that llmserve raises on purpose.

The tree::

    LlmserveError
    ├── ConfigError               a setting: names the field, the value and the limit
    ├── InvalidRequestError       one request's fault: a 400 to that client, nothing else is touched
    │   └── ContextLengthError    prompt + max_tokens do not fit max_seq_len or the KV cache
    ├── CheckpointError           what is on disk cannot be used: names it and says what to do
    │   ├── CheckpointNotFoundError
    │   └── UnsupportedCheckpointError   an architecture, format or feature that is not implemented
    ├── QualityError              a conversion is worse than the limit it was given: names both
    ├── BatchError                a batch job cannot start or go on: says what to do
    │   ├── BatchInputError       the jobs file: names line and field of each fault
    │   └── BatchJournalError     the record of finished answers cannot be used or written
    ├── RequestTimeoutError       a request did not end within the timeout it came with
    └── EngineError               the engine's fault, never the client's
        ├── EngineOverloadedError        the queue is full: try again later
        ├── EngineDeadError              the engine process died or hangs; it is being restarted
        └── EngineShutdownError          draining or shut down: no new requests

It knows neither HTTP nor torch. The server maps classes to status codes in one table.
"""

from __future__ import annotations


class LlmserveError(Exception):
    """Base of all errors raised on purpose. ``str(error)`` is a sentence for a person."""


class ConfigError(LlmserveError, ValueError):
    """A setting has a value that cannot be honoured."""


class InvalidRequestError(LlmserveError, ValueError):
    """A request that cannot be served as asked.

    Attributes:
        param: The field at fault, in the client's spelling, or None.
        code: A machine-readable code such as ``context_length_exceeded``, or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(InvalidRequestError):
    """The prompt and the tokens asked for do not fit the model's context."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class RequestTimeoutError(LlmserveError):
    """A request's own timeout has passed before its end."""


class CheckpointError(LlmserveError):
    """A directory or file that cannot be read as what it should be."""


class CheckpointNotFoundError(CheckpointError):
    """There is nothing at this path, nor on the Hub under this name."""


class UnsupportedCheckpointError(CheckpointError):
    """A well-formed checkpoint with something in it that llmserve does not implement."""


class QualityError(LlmserveError):
    """What was measured is beyond ``--max-kl`` or ``--min-top1``."""


class BatchError(LlmserveError):
    """A batch job cannot start or go on. What is finished is safe in its journal."""


class BatchInputError(BatchError):
    """The jobs file cannot be run as it is."""


class BatchJournalError(BatchError):
    """The journal belongs to another job or run, or cannot be written."""


class EngineError(LlmserveError):
    """The engine failed; the request may be sent again."""


class EngineOverloadedError(EngineError):
    """The waiting queue is full.

    Attributes:
        retry_after_s: A sensible pause before the next try, in seconds.
    """

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDeadError(EngineError):
    """The engine process died or made no progress; every open request fails with this."""


class EngineShutdownError(EngineError):
    """The engine takes no new requests because it is draining or has shut down."""
