"""The server's life: listen, load, serve, drain, leave.

It listens from the first moment: while the engine loads, /health and everything else is answered
with 503. The first SIGTERM or Ctrl-C drains: new requests get 503 with Retry-After, running ones
may end within ``drain_timeout_s``, what is left then ends with an error event. A second signal
leaves at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeAlias, TypeVar

import uvicorn

from llmserve.errors import ConfigError
from llmserve.llm import AsyncLLM
from llmserve.openai.serving import OpenAIServing
from llmserve.server.app import create_app
from llmserve.server.metrics import Metrics
from llmserve.server.settings import ServerSettings
from llmserve.server.state import ServingState

logger = logging.getLogger(__name__)

_IDLE_CONNECTION_S = 75  # longer than clients' pools keep theirs, so that none is closed in use
_LAST_PORT = 2**16 - 1
_LAST_WORDS_S = 5  # for responses to be written after the drain

T = TypeVar("T")
Load: TypeAlias = Callable[[], Awaitable[AsyncLLM]]


class Signals:
    """SIGTERM and SIGINT, counted.

    Attributes:
        stop: Set by the first one.
        leave: Set by the second one.
    """

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.leave = asyncio.Event()

    def receive(self) -> None:
        """One more."""
        (self.leave if self.stop.is_set() else self.stop).set()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Catch the process's signals in this block."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.receive)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to ``Signals``.

    uvicorn's own handling would close the listening socket at once, so that new clients get a
    refused connection instead of a 503, and sse-starlette, which hooks into it, would cut every
    open stream.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not listening yet.

    Raises:
        ConfigError: The address is in use or not this machine's.
    """
    if not 0 <= port <= _LAST_PORT:  # getaddrinfo would take it modulo 2**16
        raise ConfigError(f"port is {port}; it must be in [0, {_LAST_PORT}]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}; choose others with --host and --port"
        ) from None
    return sock


async def run_server(
    load: Load,
    served_model_name: str,
    settings: ServerSettings,
    sock: socket.socket,
    *,
    on_ready: Callable[[AsyncLLM], None] = lambda llm: None,
    signals: Signals | None = None,
) -> None:
    """Serve until a signal says to stop.

    Args:
        load: Makes the model ready; runs while the server already listens. If it is cancelled it
            leaves nothing behind.
        served_model_name: The name clients use.
        settings: Of the server.
        sock: Bound by ``bind``; closed here.
        on_ready: Called once requests are served.
        signals: Those to obey; None catches the process's own.

    Raises:
        LlmserveError: The model cannot be loaded, as ``load`` says.
    """
    if signals is None:
        signals = Signals()
        with signals.installed():
            await run_server(
                load, served_model_name, settings, sock, on_ready=on_ready, signals=signals
            )
        return
    state, metrics = ServingState(), Metrics(served_model_name)
    server = _Uvicorn(
        uvicorn.Config(
            create_app(state, settings, metrics),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_IDLE_CONNECTION_S,
            timeout_graceful_shutdown=_LAST_WORDS_S,
        )
    )
    listening = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        llm = await _unless(signals.stop, load())
        if llm is None:
            return
        try:
            metrics.loaded(llm.engine.info.load_s)
            timeout_s = settings.request_timeout_s
            state.loaded(OpenAIServing(llm, served_model_name, metrics, max_timeout_s=timeout_s))
            on_ready(llm)
            await _unless(signals.stop, asyncio.shield(listening))
            await _drain(state, settings.drain_timeout_s, signals)
        finally:
            # Whatever is still open is told so by the engine, and its response ends by itself.
            await llm.engine.shutdown()
    finally:
        server.should_exit = True
        server.force_exit = signals.leave.is_set()
        await listening


async def _drain(state: ServingState, timeout_s: float, signals: Signals) -> None:
    state.draining = True
    logger.info(
        "draining: running requests may take up to %g s; a second signal ends them now", timeout_s
    )
    try:
        async with asyncio.timeout(timeout_s):
            await _unless(signals.leave, state.wait_idle())
    except TimeoutError:
        logger.warning("not all requests ended within %g s; they are cut", timeout_s)


async def _unless(event: asyncio.Event, work: Awaitable[T]) -> T | None:
    """Wait for ``work``; cancel it and return None if the event comes first."""
    task = asyncio.ensure_future(work)
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        waiting.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)
