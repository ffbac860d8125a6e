"""Requests that end early, faults, deaths, hangs and shutdown."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from llmserve.config import EngineConfig
from llmserve.core.request import FinishReason
from llmserve.engine.engine import Health
from llmserve.engine.tensorrt_llm import adapter
from llmserve.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineOverloadedError,
    EngineShutdownError,
    InvalidRequestError,
)
from tests import standins
from tests.engine.factories import until
from tests.engine.tensorrt_llm.factories import (
    VOCAB_SIZE,
    Start,
    answer,
    greedy,
    is_empty,
    make_request,
    read,
)


async def test_iterations_become_statistics(start: Start) -> None:
    engine = await start()
    standins.behaviour().step_s = 0.002
    streams = [engine.submit(make_request(name=f"r{i}", max_tokens=100)) for i in range(3)]

    async def all_run() -> bool:
        return (await engine.stats()).num_running_requests == 3

    await until(all_run)
    stats = await engine.stats()
    assert stats.num_queued_requests == 0
    assert (stats.max_num_blocks, stats.free_num_blocks, stats.used_num_blocks) == (64, 61, 3)
    assert (stats.reused_blocks, stats.missed_blocks) == (2, 4)  # with the warm-up
    assert (stats.alloc_total_blocks, stats.alloc_new_blocks) == (3, 3)
    assert stats.tokens_per_block == engine.info.tokens_per_block
    assert stats.last_step_s == 0.0125
    assert (stats.iter_scheduled_requests, stats.iter_gen_requests) == (3, 3)
    assert (stats.iter_context_requests, stats.iter_decoded_tokens) == (0, 3)
    assert stats.num_steps > 1
    for stream in streams:
        await stream.aclose()
    await until(lambda: is_empty(engine))
    stats = await engine.stats()
    assert (stats.used_num_blocks, stats.free_num_blocks) == (0, 64)
    assert stats.finished == {"abort": 3}
    assert stats.num_completed_requests == 3


async def test_an_abort_comes_as_the_last_output(start: Start) -> None:
    engine = await start()
    standins.behaviour().step_s = 0.005
    stream = engine.submit(make_request(max_tokens=100))
    first = await anext(stream)
    await engine.abort("r")
    await engine.abort("r")
    await engine.abort("nobody")
    rest = await read(stream)
    assert rest[-1].finish_reason is FinishReason.ABORT
    tokens = [token_id for output in (first, *rest) for token_id in output.token_ids]
    assert tokens == greedy(count=100)[: len(tokens)]
    assert len(tokens) < 100


async def test_a_timeout_comes_as_the_last_output(start: Start) -> None:
    engine = await start()
    standins.behaviour().step_s = 0.005
    late = replace(make_request(max_tokens=100), timeout_s=0.05)
    in_time = replace(make_request(name="s", max_tokens=2), timeout_s=30.0)
    (tokens, last), (_, other) = await asyncio.gather(answer(engine, late), answer(engine, in_time))
    assert (last.finish_reason, last.error) == (
        FinishReason.TIMEOUT,
        "the timeout of 0.05 s has passed",
    )
    assert tokens == greedy(count=100)[: len(tokens)]
    assert 0 < len(tokens) < 100
    assert other.finish_reason is FinishReason.LENGTH
    assert (await engine.stats()).finished == {"timeout": 1, "length": 1}


async def test_who_leaves_first_is_no_timeout(start: Start) -> None:
    engine = await start()
    standins.behaviour().running.clear()
    stream = engine.submit(replace(make_request(), timeout_s=0.02))
    await engine.abort("r")
    await asyncio.sleep(0.05)
    standins.behaviour().running.set()
    assert (await read(stream))[-1].finish_reason is FinishReason.ABORT


async def test_a_stream_that_is_left_is_aborted_and_its_id_stays_taken(start: Start) -> None:
    engine = await start()
    standins.behaviour().running.clear()
    stream = engine.submit(make_request())
    await stream.aclose()
    with pytest.raises(InvalidRequestError, match="in use already"):
        engine.submit(make_request())
    standins.behaviour().running.set()
    await until(lambda: is_empty(engine))
    assert (await answer(engine, make_request()))[0] == greedy()


async def test_an_abort_that_is_never_confirmed_is_given_up(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await start(config=EngineConfig(max_seq_len=128, stall_timeout_s=0.2))
    standins.behaviour().lose_aborts = True
    standins.behaviour().step_s = 0.01
    stream = engine.submit(make_request(max_tokens=100))
    await anext(stream)
    await engine.abort("r")
    last = (await read(stream))[-1]
    assert last.finish_reason is FinishReason.ABORT
    assert "did not confirm" in caplog.text
    assert await engine.health() == Health(True)
    assert (await answer(engine, make_request()))[0] == greedy()


async def test_a_fault_of_one_request_is_its_own(start: Start) -> None:
    engine = await start()
    standins.behaviour().request_errors[9, 9] = "the guide could not be compiled"
    failing = make_request((9, 9), name="bad")
    (bad_tokens, bad), *good = await asyncio.gather(
        answer(engine, failing), *(answer(engine, make_request(name=f"r{i}")) for i in range(5))
    )
    assert len(bad_tokens) == 1
    assert (bad.finish_reason, bad.error) == (FinishReason.ERROR, "the guide could not be compiled")
    assert [tokens for tokens, _ in good] == [greedy()] * 5
    assert await engine.health() == Health(True)
    assert (await engine.stats()).finished == {"error": 1, "length": 5}
    standins.behaviour().finish_reason = "timeout"
    _, last = await answer(engine, make_request())
    assert last.finish_reason is FinishReason.ERROR
    assert "'timeout'" in (last.error or "")


async def test_a_refusal_is_the_requests(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start()

    def refuse(**_: Any) -> None:
        raise ValueError("top_k is not what I like")

    (llm,) = standins.behaviour().llms
    with monkeypatch.context() as patch:
        patch.setattr(llm, "generate_async", refuse)
        with pytest.raises(InvalidRequestError, match="not what I like"):
            engine.submit(make_request())
    assert (await answer(engine, make_request()))[0] == greedy()


async def test_a_death_is_told_to_every_request(start: Start) -> None:
    engine = await start()
    standins.behaviour().step_s = 0.005
    requests = [make_request(name=f"r{i}", max_tokens=100) for i in range(4)]
    streams = [engine.submit(request) for request in requests]
    for stream in streams:
        await anext(stream)
    standins.behaviour().die_at_step = 10
    for stream in streams:
        with pytest.raises(EngineDeadError, match=r"illegal access.*may be sent again"):
            await read(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    health = await engine.health()
    assert not health.ok
    assert "illegal access" in health.reason
    with pytest.raises(EngineDeadError, match="illegal access"):
        engine.submit(make_request())
    assert (await engine.stats()).finished == {"error": 4}


async def test_a_death_while_idle_shows_at_the_next_request(start: Start) -> None:
    engine = await start()
    standins.behaviour().llms[0]._executor.stop()
    with pytest.raises(EngineDeadError, match="LLM is shutting down"):
        engine.submit(make_request())
    assert not (await engine.health()).ok


async def test_a_hang_is_noticed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_SHUTDOWN_TIMEOUT_S", 0.1)
    engine = await start(config=EngineConfig(max_seq_len=128, stall_timeout_s=0.2))
    await asyncio.sleep(0.5)
    assert await engine.health() == Health(True)  # it is idle, and that is no hang
    standins.behaviour().step_s = 0.005
    streams = [engine.submit(make_request(name=f"r{i}", max_tokens=100)) for i in range(2)]
    await anext(streams[0])
    standins.behaviour().running.clear()
    for stream in streams:
        with pytest.raises(EngineDeadError, match=r"no progress for 0\.2 s"):
            await read(stream)
    assert "no progress" in (await engine.health()).reason
    await engine.shutdown()  # the LLM's own hangs too


async def test_slow_is_not_hung(start: Start) -> None:
    engine = await start(config=EngineConfig(max_seq_len=128, stall_timeout_s=0.4))
    standins.behaviour().step_s = 0.1
    assert (await answer(engine, make_request(max_tokens=8)))[0] == greedy(count=8)


async def test_what_can_never_fit_is_refused(start_kind: Start) -> None:
    whole = EngineConfig(enable_chunked_prefill=False, max_num_tokens=32)
    engine = await start_kind("engine", config=whole)
    with pytest.raises(ContextLengthError, match="maximum context length is 128"):
        engine.submit(make_request((1,) * 20, max_tokens=109))
    with pytest.raises(ContextLengthError, match="without chunked prefill it may have at most 32"):
        engine.submit(make_request((1,) * 33))
    with pytest.raises(InvalidRequestError, match="320 is not in the vocabulary"):
        engine.submit(make_request((1, VOCAB_SIZE)))
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        engine.submit(make_request(()))
    assert standins.behaviour().submitted == []
    token_ids, last = await answer(engine, make_request((1,) * 20, max_tokens=108))
    assert (len(token_ids), last.finish_reason) == (108, FinishReason.LENGTH)


async def test_a_full_queue_is_overload(start_kind: Start) -> None:
    config = EngineConfig(max_seq_len=128, max_batch_size=2, max_queue_size=1)
    engine = await start_kind("engine", config=config)
    standins.behaviour().running.clear()
    streams = [engine.submit(make_request(name=f"r{i}")) for i in range(3)]
    with pytest.raises(EngineOverloadedError, match="1 requests are waiting"):
        engine.submit(make_request(name="one more"))
    standins.behaviour().running.set()
    for stream in streams:
        assert [token for output in await read(stream) for token in output.token_ids] == greedy()


async def test_shutdown_drains(start: Start) -> None:
    engine = await start()
    standins.behaviour().step_s = 0.005
    short, long = make_request(name="short"), make_request(name="long", max_tokens=120)
    streams = [engine.submit(short), engine.submit(long)]
    (llm,) = standins.behaviour().llms
    closing = asyncio.create_task(engine.shutdown(drain_s=0.3))
    await asyncio.sleep(0)
    with pytest.raises(EngineShutdownError, match="no new requests"):
        engine.submit(make_request())
    ends = [(await read(stream))[-1].finish_reason for stream in streams]
    assert ends == [FinishReason.LENGTH, FinishReason.ABORT]
    await closing
    assert llm._executor is None
    assert await engine.health() == Health(False, "the engine has shut down")
    await engine.shutdown()
