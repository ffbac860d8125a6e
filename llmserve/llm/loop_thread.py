"""An asyncio event loop in a daemon thread, for callers that have none or one of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from llmserve.errors import EngineShutdownError

T = TypeVar("T")


class LoopThread:
    """Runs coroutines until it is stopped; a daemon, so that it never keeps a script alive."""

    def __init__(self, name: str) -> None:
        self._ready = threading.Event()
        # Reentrant: the garbage collector may call ``stop`` while ``submit`` holds it.
        self._lock = threading.RLock()
        self._closed = False
        self._last: Coroutine[Any, Any, None] | None = None
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()
        self._ready.wait()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the loop. Cancelling the future cancels it.

        Raises:
            EngineShutdownError: The thread was stopped.
        """
        with self._lock:
            if self._closed:
                coroutine.close()
                raise EngineShutdownError("the LLM was shut down")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and wait for it; an interrupt here cancels it there."""
        future = self.submit(coroutine)
        try:
            return future.result()
        finally:
            future.cancel()

    def stop(self, last: Coroutine[Any, Any, None] | None = None) -> None:
        """Take no more coroutines, run a last one, cancel what still runs and end the thread.

        Waits for the end, unless this is called in the thread itself, as the garbage collector
        may do. A second call does nothing.
        """
        with self._lock:
            if self._closed:
                if last is not None:
                    last.close()
                return
            self._closed = True
            self._last = last
            self._loop.call_soon_threadsafe(self._stopped.set)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _main(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._ready.set()
        await self._stopped.wait()
        if self._last is not None:
            await self._last
