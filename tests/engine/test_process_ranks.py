"""The engine process of a tensor-parallel model: its ranks live and die with it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from llmserve.build.native import build
from llmserve.config import BuildConfig, EngineConfig
from llmserve.convert.converter import convert
from llmserve.core.request import FinishReason
from llmserve.engine.native import EngineCore
from llmserve.engine.process import ProcessEngine
from llmserve.engine.runner_spec import TorchRunnerSpec
from llmserve.errors import EngineDeadError
from tests.engine.factories import drain, make_request, until
from tests.processes import has_ended
from tests.runtime.torch_engines import make_engine

CONFIG = EngineConfig(threads=1, max_batch_size=8, device="cpu")
REQUESTS = [make_request(i, prompt_length=3 + 7 * i, max_tokens=12) for i in range(6)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as an engine of one rank, ``engine``, and of two, ``engine2``."""
    path = tmp_path_factory.mktemp("ranks")
    make_engine(path)
    checkpoint = convert(path / "hf", path / "checkpoint2", tp_size=2)
    build(checkpoint, path / "engine2", BuildConfig(max_seq_len=256))
    return path


def _expected(engine: Path) -> list[tuple[list[int], FinishReason | None]]:
    """What one rank answers, one request at a time."""
    runner, limits = TorchRunnerSpec(str(engine)).load(CONFIG)
    core = EngineCore(runner, limits, CONFIG)
    answers = []
    for request in REQUESTS:
        core.add_request(request)
        outputs = []
        while core.has_unfinished_requests():
            outputs += core.step()
        tokens = [token for output in outputs for token in output.token_ids]
        answers.append((tokens, outputs[-1].finish_reason))
    core.shutdown()
    return answers


async def _is_ok(engine: ProcessEngine) -> bool:
    return (await engine.health()).ok


async def _serve_all(engine: ProcessEngine) -> list[tuple[list[int], FinishReason | None]]:
    return await asyncio.gather(*(drain(engine.submit(request)) for request in REQUESTS))


async def test_ranks_live_and_die_with_the_engine(path: Path, no_leaks: None) -> None:
    expected = _expected(path / "engine")
    engine = ProcessEngine(path / "engine2", CONFIG)
    await engine.start()
    try:
        (rank,) = psutil.Process(engine.info.pid).children()
        assert await _serve_all(engine) == expected

        # A request that is aborted is forgotten on every rank, and nobody else notices.
        stream = engine.submit(make_request(9, max_tokens=200))
        await anext(stream)
        for ignored in (signal.SIGINT, signal.SIGTERM):
            os.kill(rank.pid, ignored)  # the parent's business
        await engine.abort("request-9")
        assert (await drain(stream))[1] is FinishReason.ABORT
        assert await _serve_all(engine) == expected

        stream = engine.submit(make_request(9, max_tokens=200))
        await anext(stream)
        first_pid = engine.info.pid
        rank.kill()
        with pytest.raises(
            EngineDeadError, match=r"failed: rank 1 of 2 was killed by SIGKILL; the"
        ):
            await asyncio.wait_for(drain(stream), 10)
        assert "rank 1 of 2 was killed by SIGKILL; it is being" in (await engine.health()).reason
        assert has_ended(first_pid)

        await until(lambda: _is_ok(engine), timeout_s=60)
        assert await _serve_all(engine) == expected
        (rank,) = psutil.Process(engine.info.pid).children()
        os.kill(engine.info.pid, signal.SIGKILL)
        assert has_ended(rank.pid)
    finally:
        await engine.shutdown()


@pytest.mark.full
async def test_shutdown_leaves_no_rank(path: Path, no_leaks: None) -> None:
    engine = ProcessEngine(path / "engine2", CONFIG)
    await engine.start()
    (rank,) = psutil.Process(engine.info.pid).children()
    await engine.shutdown()
    assert has_ended(rank.pid)
