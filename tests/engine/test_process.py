"""The engine process in its ordinary life. Its deaths are in test_process_death.py."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from llmserve.config import EngineConfig
from llmserve.core.request import FinishReason
from llmserve.core.sampling_params import SamplingParams
from llmserve.engine import process
from llmserve.engine.process import ProcessEngine
from llmserve.errors import (
    CheckpointNotFoundError,
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    EngineOverloadedError,
    EngineShutdownError,
    InvalidRequestError,
)
from tests.engine.conftest import StartEngine
from tests.engine.factories import drain, generate, make_engine, make_request, until


async def all_blocks_free(engine: ProcessEngine) -> bool:
    stats = await engine.stats()
    running = stats.num_running_requests + stats.num_queued_requests
    return stats.used_num_blocks == 0 and running == 0


def test_the_parent_imports_no_torch() -> None:
    code = "import sys, llmserve.engine.process; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_many_at_once(start_engine: StartEngine) -> None:
    engine = await start_engine()
    requests = [
        make_request(i, prompt_length=1 + i % 40, max_tokens=1 + i % 50) for i in range(150)
    ]
    await asyncio.gather(*(generate(engine, request) for request in requests))
    stats = await engine.stats()  # the last output brought it along: no waiting
    assert await all_blocks_free(engine)
    assert stats.finished == {"length": 150}
    assert stats.free_num_blocks == stats.max_num_blocks == engine.info.num_kv_blocks
    assert await engine.health() == process.Health(True)


async def test_info_and_readiness(start_engine: StartEngine, sockets_root: Path) -> None:
    unstarted = make_engine()
    assert not (await unstarted.health()).ok
    with pytest.raises(EngineDeadError, match="not been started"):
        _ = unstarted.info
    with pytest.raises(EngineDeadError, match="not been started"):
        unstarted.submit(make_request(0))
    engine = await start_engine(EngineConfig(max_seq_len=128))
    assert os.listdir(sockets_root) == []  # a killed program leaves no sockets behind
    assert engine.info.max_seq_len == 128
    assert engine.info.load_s > 0
    assert psutil.Process(engine.info.pid).ppid() == os.getpid()
    with pytest.raises(RuntimeError, match="once"):
        await engine.start()


async def test_leaving_a_stream_frees_its_blocks(start_engine: StartEngine) -> None:
    engine = await start_engine(step_s=0.005)

    async def closed() -> None:
        stream = engine.submit(make_request(1, max_tokens=200))
        await anext(stream)
        await stream.aclose()
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    async def broken_off() -> None:
        async for _ in engine.submit(make_request(2, max_tokens=200)):
            break

    async def cancelled() -> None:
        stream = engine.submit(make_request(3, max_tokens=200))
        task = asyncio.create_task(drain(stream))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    async def never_begun() -> None:
        engine.submit(make_request(4, max_tokens=200))

    stays = asyncio.create_task(generate(engine, make_request(5, max_tokens=60)))
    await asyncio.gather(closed(), broken_off(), cancelled(), never_begun())
    await stays
    await until(lambda: all_blocks_free(engine), 5.0)
    assert (await engine.stats()).finished == {"abort": 4, "length": 1}
    assert engine._queues == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": 2**64}, "serialize ints"),
        ({"seed": np.int64(1)}, "numpy.int64"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"stop": "\ud800"}, "surrogates"),
    ],
    ids=str,
)
async def test_what_the_process_could_not_read_is_refused(
    start_engine: StartEngine, settings: dict[str, Any], words: str
) -> None:
    engine = await start_engine(step_s=0.005)
    pid = engine.info.pid
    stays = asyncio.create_task(generate(engine, make_request(1, max_tokens=30)))
    await asyncio.sleep(0.02)
    params = SamplingParams(**{"seed": 0, "max_tokens": 3, **settings})
    with pytest.raises(InvalidRequestError, match=words):
        engine.submit(replace(make_request(0), sampling_params=params))
    assert list(engine._queues) == ["request-1"]
    await stays
    assert engine.info.pid == pid
    await generate(engine, make_request(0))  # the id is not in use


async def test_abort_by_id(start_engine: StartEngine) -> None:
    engine = await start_engine(step_s=0.005)
    stream = engine.submit(make_request(1, max_tokens=200))
    await anext(stream)
    await engine.abort("nobody's")
    await engine.abort("request-1")
    _, finish_reason = await drain(stream)
    assert finish_reason is FinishReason.ABORT
    await engine.abort("request-1")
    assert await all_blocks_free(engine)
    await generate(engine, make_request(1))  # the id is free again


async def test_the_process_listens_while_a_step_runs(start_engine: StartEngine) -> None:
    engine = await start_engine(EngineConfig(max_batch_size=1, max_queue_size=2), step_s=2.0)
    begun_s = time.monotonic()
    aborted = engine.submit(make_request(1))
    late = engine.submit(replace(make_request(2), timeout_s=0.2))
    await asyncio.sleep(0.1)
    await engine.abort("request-1")
    assert (await drain(aborted))[1] is FinishReason.ABORT
    outputs = [output async for output in late]
    assert [output.finish_reason for output in outputs] == [FinishReason.TIMEOUT]
    assert outputs[0].error == "the request did not end within its timeout of 0.2 s"
    assert time.monotonic() - begun_s < 1.5
    assert (await engine.stats()).finished == {"abort": 1, "timeout": 1}
    assert await all_blocks_free(engine)


async def test_an_id_is_taken_until_its_request_has_ended(start_engine: StartEngine) -> None:
    engine = await start_engine(step_s=0.01)
    stream = engine.submit(make_request(1))
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.submit(make_request(1))
    await stream.aclose()
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.submit(make_request(1))


async def test_what_can_never_be_served_is_refused_at_once(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start_engine()
    too_long = make_request(0, prompt_length=200, max_tokens=57)
    with pytest.raises(ContextLengthError, match=r"256 tokens, but 257 .*200 .*57"):
        engine.submit(too_long)
    # The process does not rely on it: what slips through comes back as the same error.
    monkeypatch.setattr(process, "check_request", lambda request, info: None)
    with pytest.raises(ContextLengthError, match=r"256 tokens, but 257 .*200 .*57") as raised:
        await drain(engine.submit(too_long))
    assert raised.value.param == "max_tokens"
    assert engine._queues == {}
    await generate(engine, make_request(1))


async def test_a_full_queue_is_overload(start_engine: StartEngine) -> None:
    engine = await start_engine(EngineConfig(max_queue_size=5, max_batch_size=2), step_s=0.01)
    streams = [engine.submit(make_request(i)) for i in range(5)]
    with pytest.raises(EngineOverloadedError, match="5 requests are waiting"):
        engine.submit(make_request(5))
    await asyncio.gather(*(drain(stream) for stream in streams))
    await generate(engine, make_request(5))


async def test_a_requests_own_fault_is_its_last_output(start_engine: StartEngine) -> None:
    engine = await start_engine(errors={"request-1": "its logits are not finite"})
    failed = engine.submit(make_request(1))
    await generate(engine, make_request(2))
    outputs = [output async for output in failed]
    assert [output.finish_reason for output in outputs] == [FinishReason.ERROR]
    assert outputs[0].error == "its logits are not finite"
    assert (await engine.health()).ok


async def test_an_idle_engine_rests(start_engine: StartEngine) -> None:
    engine = await start_engine()
    await generate(engine, make_request(1))
    worker = psutil.Process(engine.info.pid)
    before = sum(worker.cpu_times()[:2])
    await asyncio.sleep(0.5)
    assert sum(worker.cpu_times()[:2]) - before < 0.05


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_being_asked_to_end_is_the_parents_business(
    start_engine: StartEngine, signum: signal.Signals
) -> None:
    engine = await start_engine()
    # A terminal signals the foreground process group, and the engine is not even in it.
    assert os.getpgid(engine.info.pid) != os.getpgid(0)
    os.kill(engine.info.pid, signum)
    await generate(engine, make_request(1))


async def test_errors_at_the_start_are_what_they_were(no_leaks: None, tmp_path: Path) -> None:
    engine = ProcessEngine(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=str(tmp_path)):
        await engine.start()
    health = await engine.health()
    assert not health.ok
    assert str(tmp_path) in health.reason
    with pytest.raises(EngineDeadError, match="could not start"):
        engine.submit(make_request(0))
    await engine.shutdown()
    with pytest.raises(ConfigError, match=r"max_seq_len is 257; .* 256"):
        await make_engine(EngineConfig(max_seq_len=257)).start()


async def test_drain_lets_open_requests_end(start_engine: StartEngine) -> None:
    engine = await start_engine(step_s=0.01)
    open_requests = [asyncio.create_task(generate(engine, make_request(i))) for i in range(5)]
    await asyncio.sleep(0.05)
    leaving = asyncio.create_task(engine.shutdown(drain_s=10))
    await asyncio.sleep(0)
    assert "shutting down" in (await engine.health()).reason
    with pytest.raises(EngineShutdownError, match="no new requests"):
        engine.submit(make_request(9))
    await asyncio.gather(*open_requests)
    await asyncio.wait_for(leaving, 5)
    assert not psutil.pid_exists(engine.info.pid)


async def test_shutdown_aborts_what_does_not_end_in_time(start_engine: StartEngine) -> None:
    engine = await start_engine(step_s=0.05)
    streams = [engine.submit(make_request(i, max_tokens=200)) for i in range(3)]
    await anext(streams[0])
    await asyncio.gather(engine.shutdown(drain_s=0.2), engine.shutdown())
    for stream in streams:
        assert (await drain(stream))[1] is FinishReason.ABORT
    await engine.shutdown()
    assert (await engine.health()).reason == "the engine has shut down"


async def test_shutdown_in_the_middle_of_loading(start_engine: StartEngine) -> None:
    engine = make_engine(load_s=60)
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0.3)
    assert (await engine.health()).reason == "the engine is loading"
    await asyncio.wait_for(engine.shutdown(drain_s=30), 5)
    with pytest.raises(EngineShutdownError, match="loading"):
        await starting


async def test_shutdown_at_once(no_leaks: None) -> None:
    engine = make_engine()
    await engine.start()
    await engine.shutdown()


async def test_a_start_that_is_cancelled_leaves_nothing(no_leaks: None) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(make_engine(load_s=60).start(), 0.3)
