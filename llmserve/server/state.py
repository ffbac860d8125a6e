"""What the server is at a moment: loading, serving or draining, and how many requests are open."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from llmserve.engine.engine import Health
from llmserve.errors import EngineDeadError, EngineShutdownError
from llmserve.openai.errors import EngineLoadingError
from llmserve.openai.serving import OpenAIServing

_HEALTH_TIMEOUT_S = 5.0


class ServingState:
    """Shared by the routes and whoever starts and stops the server; of one event loop.

    Attributes:
        draining: Set once the server is told to stop; then no new requests are taken.
    """

    def __init__(self) -> None:
        self.draining = False
        self._serving: OpenAIServing | None = None
        self._num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def loaded(self, serving: OpenAIServing) -> None:
        """Begin to serve: the engine is loaded and warm."""
        self._serving = serving

    @property
    def serving(self) -> OpenAIServing | None:
        """What serves, also while draining; None while loading."""
        return self._serving

    def require_serving(self) -> OpenAIServing:
        """What serves new requests.

        Raises:
            EngineLoadingError: The model is not loaded yet.
            EngineShutdownError: The server is draining.
        """
        if self.draining:
            raise EngineShutdownError("the server is shutting down and takes no new requests")
        if self._serving is None:
            raise EngineLoadingError("the model is still being loaded")
        return self._serving

    async def check_health(self) -> None:
        """Return if a request sent now would be served.

        Raises:
            EngineError: It would not; which one tells why.
        """
        serving = self.require_serving()
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                health = await serving.llm.engine.health()
        except TimeoutError:
            health = Health(False, f"the engine gave no sign of life for {_HEALTH_TIMEOUT_S:g} s")
        if not health.ok:
            raise EngineDeadError(health.reason)

    @contextmanager
    def open_request(self) -> Iterator[None]:
        """Count a request as open; draining waits for it."""
        self._num_open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_open -= 1
            if not self._num_open:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Return once no request is open."""
        await self._idle.wait()
