"""What every engine has in common: started once, healthy or saying why not, and shut down."""

from __future__ import annotations

import asyncio
from abc import abstractmethod

from llmserve.config import EngineConfig
from llmserve.engine.engine import Engine, EngineInfo, Health
from llmserve.errors import EngineDeadError, EngineOverloadedError, EngineShutdownError


class EngineLifecycle(Engine):
    """The state of an engine between its start and its end. All methods belong to one event loop.

    Args:
        config: What to start it with.
    """

    def __init__(self, config: EngineConfig | None) -> None:
        self._config = config or EngineConfig()
        self._info: EngineInfo | None = None
        self._health = Health(False, "the engine has not been started")
        self._starting: asyncio.Task[None] | None = None
        self._closing = False
        self._shutdown_lock = asyncio.Lock()
        self._none_open = asyncio.Event()  # no request is open
        self._none_open.set()
        self._heard_something = True  # from what computes, since the watchdog last looked

    @property
    def info(self) -> EngineInfo:
        """What the engine is; raises EngineDeadError before its first start has succeeded."""
        if self._info is None:
            raise EngineDeadError(self._health.reason)
        return self._info

    async def start(self) -> None:
        """Load the model; return when it is ready.

        Raises:
            LlmserveError: What went wrong. The engine may not be started again.
            EngineShutdownError: ``shutdown`` was called meanwhile.
        """
        if self._starting is not None or self._closing:
            raise RuntimeError("an engine is started once")
        self._health = Health(False, "the engine is loading")
        self._starting = asyncio.create_task(self._load())
        try:
            await self._starting
        except asyncio.CancelledError:
            if self._closing:
                raise EngineShutdownError("the engine was shut down while it was loading") from None
            await self.shutdown()
            raise
        except Exception as error:
            self._health = Health(False, f"the engine could not start: {error}")
            raise

    async def health(self) -> Health:
        """Whether the engine serves and makes progress."""
        return self._health

    @abstractmethod
    async def _load(self) -> None:
        """Load, and say so in ``_info`` and ``_health``; raise what went wrong."""

    def _check_serves(self, *, alive: bool) -> None:
        """Raise unless requests are taken; ``alive`` is whether there is something to take them."""
        if self._closing:
            raise EngineShutdownError(f"{self._health.reason}; it takes no new requests")
        if not alive:
            raise EngineDeadError(self._health.reason)

    def _check_queue(self, num_queued: int) -> None:
        """Raise EngineOverloadedError if so many requests wait that no further one may."""
        if num_queued >= self._config.max_queue_size:
            raise EngineOverloadedError(
                f"{num_queued} requests are waiting, the most that may; try again later"
            )
