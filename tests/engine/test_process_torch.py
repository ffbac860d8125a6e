"""The engine process with the real runtime in it, on a tiny random model."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from llmserve.config import EngineConfig
from llmserve.engine.native import EngineCore
from llmserve.engine.process import ProcessEngine
from llmserve.engine.runner_spec import TorchRunnerSpec
from llmserve.errors import ConfigError
from tests.engine.factories import drain, make_request, until
from tests.runtime.torch_engines import make_engine


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine(tmp_path_factory.mktemp("tiny"))


async def test_it_answers_as_the_core_does(engine_dir: Path, no_leaks: None) -> None:
    config = EngineConfig(threads=1, max_batch_size=8, device="cpu")
    requests = [make_request(i, prompt_length=3 + 7 * i, max_tokens=12) for i in range(6)]
    expected = {}
    for request in requests:  # one at a time
        runner, limits = TorchRunnerSpec(str(engine_dir)).load(config)
        core = EngineCore(runner, limits, config)
        core.add_request(request)
        outputs = []
        while core.has_unfinished_requests():
            outputs += core.step()
        expected[request.request_id] = [token for o in outputs for token in o.token_ids]
        core.shutdown()

    engine = ProcessEngine(engine_dir, config)
    await engine.start()
    try:
        assert (engine.info.device, engine.info.dtype) == ("cpu", "float32")
        assert engine.info.max_batch_size == 8
        for life in range(2):
            answers = await asyncio.gather(*(drain(engine.submit(request)) for request in requests))
            for request, (token_ids, _) in zip(requests, answers, strict=True):
                assert token_ids == expected[request.request_id]
            if life == 0:
                os.kill(engine.info.pid, signal.SIGKILL)
                await until(lambda: _is(engine, ok=False))
                await until(lambda: _is(engine, ok=True))
    finally:
        await engine.shutdown()


async def test_a_limit_beyond_the_engines(engine_dir: Path, no_leaks: None) -> None:
    with pytest.raises(ConfigError, match="max_seq_len is 257; the engine was built for at most 2"):
        await ProcessEngine(engine_dir, EngineConfig(max_seq_len=257)).start()


async def _is(engine: ProcessEngine, *, ok: bool) -> bool:
    return (await engine.health()).ok is ok
