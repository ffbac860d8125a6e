from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import psutil
import pytest

from llmserve.config import EngineConfig
from llmserve.engine.process import ProcessEngine
from tests.engine.factories import ROOMY, make_engine

StartEngine = Callable[..., Awaitable[ProcessEngine]]


@pytest.fixture
def sockets_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This test's own place for sockets, with a path that is short enough for them."""
    with tempfile.TemporaryDirectory(prefix="test-") as root:
        monkeypatch.setattr(tempfile, "tempdir", root)
        yield Path(root)


@pytest.fixture
async def no_leaks(sockets_root: Path) -> AsyncIterator[None]:
    """Nothing is left of the test's engines: no process, task, thread, file or socket."""
    me = psutil.Process()
    fds, threads = me.num_fds(), threading.active_count()
    yield
    assert me.children(recursive=True) == []
    assert len(asyncio.all_tasks()) == 1
    # Child watchers' threads may take a moment to return.
    for _ in range(100):
        if threading.active_count() <= threads and me.num_fds() <= fds:
            break
        await asyncio.sleep(0.01)
    assert threading.active_count() <= threads
    assert me.num_fds() <= fds
    assert os.listdir(sockets_root) == []


@pytest.fixture
async def start_engine(no_leaks: None) -> AsyncIterator[StartEngine]:
    """Start engines with a fake runner; all are shut down at the end, and must be empty then."""
    engines: list[ProcessEngine] = []

    async def start(config: EngineConfig = ROOMY, **settings: object) -> ProcessEngine:
        engine = make_engine(config, **settings)
        engines.append(engine)
        await engine.start()
        return engine

    yield start
    for engine in engines:
        await engine.shutdown()
        assert engine._queues == {}
