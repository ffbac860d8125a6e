"""Blocking calls out of an event loop that may never return."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


async def in_thread(
    function: Callable[[], _T], unclaimed: Callable[[_T], object] | None = None
) -> _T:
    """Call a blocking function in a thread that does not keep the program from ending.

    ``unclaimed`` gets a result for which nobody waits any more.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def deliver(result: _T | None, error: BaseException | None) -> None:
        if future.done():
            if error is None and unclaimed is not None:
                threading.Thread(target=unclaimed, args=(result,), daemon=True).start()
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def call() -> None:
        try:
            result, error = function(), None
        except BaseException as caught:
            result, error = None, caught
        with contextlib.suppress(RuntimeError):  # the loop has closed
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=call, name="tensorrt-llm", daemon=True).start()
    return await future
