"""A real server on a free port, in the event loop of the test."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from llmserve.llm import AsyncLLM
from llmserve.server.run import Load, Signals, bind, run_server
from llmserve.server.settings import ServerSettings
from tests.openai.models import MODEL


@dataclass
class LiveServer:
    """A server that runs.

    Attributes:
        url: Without a slash at its end.
        client: Talks to it, with a small pool of its own.
        signals: Tell it to stop.
        done: Ends when the server has left.
    """

    url: str
    client: httpx.AsyncClient
    signals: Signals
    done: asyncio.Task[None]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@asynccontextmanager
async def live_server(
    llm: AsyncLLM | Load, settings: ServerSettings | None = None
) -> AsyncIterator[LiveServer]:
    sock, signals, ready = bind("127.0.0.1", 0), Signals(), asyncio.Event()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"

    async def loaded() -> AsyncLLM:
        assert isinstance(llm, AsyncLLM)
        return llm

    load: Load = loaded if isinstance(llm, AsyncLLM) else llm
    done = asyncio.create_task(
        run_server(
            load,
            MODEL,
            settings or ServerSettings(),
            sock,
            on_ready=lambda _: ready.set(),
            signals=signals,
        )
    )
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        if isinstance(llm, AsyncLLM):
            await ready.wait()
        await until(lambda: _accepts(sock))
        try:
            yield LiveServer(url, client, signals, done)
        finally:
            await client.aclose()
            signals.receive()
            signals.receive()
            await asyncio.gather(done, return_exceptions=True)


def _accepts(sock: socket.socket) -> bool:
    return sock.fileno() < 0 or bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> float:
    """Wait for a condition; return how long it took."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    return loop.time() - start_s
