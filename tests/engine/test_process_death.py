"""The engine process dies, fails or hangs; or its parent does."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
import zmq.asyncio

from llmserve.config import EngineConfig
from llmserve.engine.process import OutputStream, ProcessEngine
from llmserve.engine.runner_spec import TorchRunnerSpec
from llmserve.errors import EngineDeadError, EngineError
from tests.engine.conftest import StartEngine
from tests.engine.factories import drain, generate, make_engine, make_request, until
from tests.processes import has_ended


async def is_ok(engine: ProcessEngine) -> bool:
    return (await engine.health()).ok


async def dies(stream: OutputStream) -> float:
    """When the stream raised EngineDeadError."""
    with pytest.raises(EngineDeadError):
        await drain(stream)
    return time.monotonic()


async def test_killed_in_mid_stream(start_engine: StartEngine) -> None:
    engine = await start_engine(step_s=0.01)
    streams = [engine.submit(make_request(i, max_tokens=200)) for i in range(20)]
    for stream in streams:
        await anext(stream)
    waiting = [asyncio.create_task(dies(stream)) for stream in streams]
    first_pid = engine.info.pid
    os.kill(first_pid, signal.SIGKILL)
    killed_s = time.monotonic()
    assert max(await asyncio.gather(*waiting)) - killed_s < 1.0
    health = await engine.health()
    assert not health.ok
    assert health.reason == "the engine process was killed by SIGKILL; it is being restarted"
    assert (await engine.stats()).used_num_blocks == 0
    with pytest.raises(EngineDeadError, match="being restarted"):
        engine.submit(make_request(0))
    assert await until(lambda: is_ok(engine)) < 10
    assert engine.info.pid != first_pid
    await generate(engine, make_request(0))


async def test_killed_while_idle(start_engine: StartEngine) -> None:
    engine = await start_engine()
    os.kill(engine.info.pid, signal.SIGKILL)

    async def is_down() -> bool:
        return not await is_ok(engine)

    assert await until(is_down) < 1.0
    await until(lambda: is_ok(engine))
    await generate(engine, make_request(0))


async def test_a_step_that_raises(
    start_engine: StartEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = await start_engine(fail_at_step=3)
    with pytest.raises(EngineDeadError, match="RuntimeError: the fake runner fails at step 3"):
        await drain(engine.submit(make_request(0)))
    assert "Traceback" in capfd.readouterr().err
    await until(lambda: is_ok(engine))
    await generate(engine, make_request(1, max_tokens=3))  # three steps work


@pytest.mark.parametrize("how", ["slow step", "stopped"])
async def test_a_hang(start_engine: StartEngine, how: str) -> None:
    config = EngineConfig(stall_timeout_s=0.4)
    engine = await start_engine(config, step_s=60.0 if how == "slow step" else 0.01)
    first_pid = engine.info.pid
    if how == "stopped":
        os.kill(first_pid, signal.SIGSTOP)
    await asyncio.sleep(0.25)  # idle silence is not counted
    begun_s = time.monotonic()
    stream = engine.submit(make_request(0))
    with pytest.raises(EngineDeadError, match=r"made no progress for 0\.4 s"):
        await drain(stream)
    assert 0.39 < time.monotonic() - begun_s < 5
    assert not await is_ok(engine)
    await until(lambda: is_ok(engine))
    assert not psutil.pid_exists(first_pid)


async def test_answering_is_no_progress(start_engine: StartEngine) -> None:
    # What computes hangs; what talks to the parent does not.
    engine = await start_engine(EngineConfig(stall_timeout_s=0.8), step_s=60.0)
    stream = engine.submit(make_request(0))

    async def come_and_go() -> None:
        for i in range(1, 1000):
            await engine.submit(make_request(i)).aclose()
            await asyncio.sleep(0.02)

    coming = asyncio.create_task(come_and_go())
    with pytest.raises(EngineDeadError, match=r"made no progress for 0\.8 s"):
        await asyncio.wait_for(drain(stream), 5)
    coming.cancel()
    with contextlib.suppress(asyncio.CancelledError, EngineDeadError):
        await coming


async def test_slow_is_not_hung(start_engine: StartEngine) -> None:
    # A prompt of five chunks brings no output for twice the time-out, and idleness is no hang.
    config = EngineConfig(stall_timeout_s=0.8, max_num_tokens=20, max_batch_size=20)
    engine = await start_engine(config, step_s=0.32)
    pid = engine.info.pid
    await asyncio.sleep(1.2)
    await generate(engine, make_request(0, prompt_length=100, max_tokens=1))
    assert engine.info.pid == pid


async def test_a_long_step_that_computes_is_not_hung(start_engine: StartEngine) -> None:
    # A full step of prompts through a large model takes minutes on a CPU.
    config = EngineConfig(stall_timeout_s=0.4)
    engine = await start_engine(config, step_s=1.5, step_computes=True)
    pid = engine.info.pid
    await generate(engine, make_request(0, max_tokens=1))
    assert engine.info.pid == pid


async def test_a_busy_parent_blames_itself(start_engine: StartEngine) -> None:
    engine = await start_engine(EngineConfig(stall_timeout_s=0.8), step_s=0.02)
    pid = engine.info.pid
    serving = asyncio.create_task(generate(engine, make_request(0, max_tokens=60)))
    await asyncio.sleep(0.1)
    time.sleep(1.6)  # noqa: ASYNC251 - the point of the test
    await serving
    assert engine.info.pid == pid


async def test_shutdown_between_death_and_restart(start_engine: StartEngine) -> None:
    engine = await start_engine()
    os.kill(engine.info.pid, signal.SIGKILL)
    await until(lambda: _has_reason(engine, "restarted"))
    await asyncio.wait_for(engine.shutdown(drain_s=10), 5)


async def test_death_ends_a_drain(start_engine: StartEngine) -> None:
    engine = await start_engine(step_s=0.02)
    stream = engine.submit(make_request(0, max_tokens=200))
    await anext(stream)
    leaving = asyncio.create_task(engine.shutdown(drain_s=30))
    await asyncio.sleep(0.05)
    os.kill(engine.info.pid, signal.SIGKILL)
    await dies(stream)
    await asyncio.wait_for(leaving, 5)


async def test_a_restart_that_fails_is_tried_again(
    start_engine: StartEngine, tmp_path: Path
) -> None:
    engine = await start_engine()
    spec, engine._runner = engine._runner, TorchRunnerSpec(str(tmp_path))
    os.kill(engine.info.pid, signal.SIGKILL)
    await until(lambda: _has_reason(engine, "could not start again"))
    with pytest.raises(EngineDeadError, match="could not start again"):
        engine.submit(make_request(0))
    engine._runner = spec
    assert await until(lambda: is_ok(engine)) > 0.3  # the second pause is longer than the first
    await generate(engine, make_request(0))


async def test_no_error_of_a_restart_is_the_last(
    start_engine: StartEngine, sockets_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start_engine()
    make_socket, tries = zmq.asyncio.Socket, 0

    def out_of_files(*args: Any) -> zmq.asyncio.Socket:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise zmq.ZMQError(errno.EMFILE)
        return make_socket(*args)

    monkeypatch.setattr(zmq.asyncio, "Socket", out_of_files)
    os.kill(engine.info.pid, signal.SIGKILL)
    await until(lambda: _has_reason(engine, "could not start again: Too many open files"))
    assert os.listdir(sockets_root) == []
    await until(lambda: is_ok(engine))
    await generate(engine, make_request(0))


async def test_a_temporary_directory_that_is_too_deep(
    no_leaks: None, sockets_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = sockets_root / ("x" * 110)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(EngineError, match="TMPDIR"):
        await make_engine().start()
    deep.rmdir()  # nothing was left in it


async def test_killed_while_loading(no_leaks: None) -> None:
    engine = make_engine(load_s=60)
    starting = asyncio.create_task(engine.start())
    for _ in range(100):
        await asyncio.sleep(0.02)
        children = psutil.Process().children()
        if children and children[0].num_threads() > 1:  # its sockets are there
            break
    children[0].kill()
    with pytest.raises(EngineDeadError, match="killed by SIGKILL while it was loading"):
        await asyncio.wait_for(starting, 5)


async def _has_reason(engine: ProcessEngine, text: str) -> bool:
    return text in (await engine.health()).reason


def test_a_process_whose_parent_died_too_early_ends(tmp_path: Path) -> None:
    endpoints = [f"ipc://{tmp_path}/requests", f"ipc://{tmp_path}/outputs"]
    somebody_else = str(os.getppid())
    command = [sys.executable, "-m", "llmserve.engine.worker", somebody_else, *endpoints]
    assert subprocess.run(command, timeout=5, check=False).returncode == 1


LOADING_PARENT = """
import asyncio
from tests.engine.factories import make_engine

asyncio.run(make_engine(load_s=60.0).start())
"""


def test_a_parent_that_is_killed_while_loading_leaves_no_sockets(sockets_root: Path) -> None:
    env = dict(os.environ, TMPDIR=str(sockets_root))
    with subprocess.Popen([sys.executable, "-c", LOADING_PARENT], env=env) as parent:
        limit = time.monotonic() + 20
        loading = False  # the engine has begun to load: its directory came and went
        while not loading:
            assert time.monotonic() < limit
            time.sleep(0.01)
            children = psutil.Process(parent.pid).children()
            loading = bool(children) and children[0].num_threads() > 1
            loading &= os.listdir(sockets_root) == []
        parent.kill()
    assert has_ended(children[0].pid)
    assert os.listdir(sockets_root) == []


PARENT = """
import asyncio
from llmserve.engine.process import ProcessEngine
from tests.engine.factories import make_engine, make_request

# A plain script, without a main guard.
async def main():
    engine = make_engine(step_s={step_s})
    await engine.start()
    stream = engine.submit(make_request(0, max_tokens=100)) if {step_s} else None
    print(engine.info.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("step_s", [0.0, 30.0], ids=["idle", "in a step"])
def test_the_process_dies_with_its_parent(step_s: float) -> None:
    command = [sys.executable, "-c", PARENT.format(step_s=step_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert not has_ended(worker, timeout_s=0.1)
        parent.kill()
    assert has_ended(worker)
