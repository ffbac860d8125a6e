"""What only a real socket shows: disconnects, keep-alives, large bodies, drains, OpenAI's SDK."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import psutil
import pytest

from llmserve.errors import CheckpointError, ConfigError
from llmserve.llm import AsyncLLM
from llmserve.server.run import bind
from llmserve.server.settings import ServerSettings
from tests.engines import ScriptedEngine
from tests.openai.models import MODEL, ScoringEngine, make_llm, says
from tests.server.live import LiveServer, live_server, until

TEXT = "the quick brown fox, wörld €uro!"
MESSAGES = [{"role": "user", "content": "hi"}]
LONG = {"model": MODEL, "prompt": "hi", "max_tokens": 200}


def slow_engine() -> ScriptedEngine:
    return ScriptedEngine(token_delay_s=0.02)


async def read_events(response: httpx.Response) -> list[str]:
    return [line async for line in response.aiter_lines() if line]


# --- disconnects ---------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("paused", [False, True])
# The shorter one: the headers are out, and the first token is not there.
@pytest.mark.parametrize("keep_alive_s", [15.0, 0.02])
async def test_a_disconnect_aborts(streamed: bool, paused: bool, keep_alive_s: float) -> None:
    engine = slow_engine()
    settings = ServerSettings(keep_alive_s=keep_alive_s)
    async with live_server(make_llm(engine), settings) as server:
        if paused:
            engine.pause()  # gone before the first token
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = json.dumps({**LONG, "n": 2, "stream": streamed}).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await until(lambda: bool(engine.requests))
        if streamed and not paused:
            assert b"200 OK" in await reader.readuntil(b"data: ")
        await asyncio.sleep(0.05)
        assert len(engine.open) == 2
        writer.transport.abort()
        assert await until(lambda: not engine.open) < 0.2
        assert len(engine.aborted) == 2
        engine.resume()
        response = await server.client.post("/v1/completions", json={**LONG, "max_tokens": 2})
        assert response.status_code == 200


async def test_a_disconnect_in_the_middle_of_a_body_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = slow_engine()
    async with live_server(make_llm(engine)) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        await asyncio.sleep(0.05)
        writer.transport.abort()
        await asyncio.sleep(0.05)
        assert (await server.client.get("/health")).status_code == 200
    assert not engine.requests
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_many_clients_and_one_in_four_leaves() -> None:
    engine = ScriptedEngine(token_delay_s=0.002)
    async with live_server(make_llm(engine)) as server:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=30) as client:

            async def one(index: int) -> None:
                num_tokens = 20 + index
                body = {**LONG, "prompt": [9, 10 + index], "max_tokens": num_tokens}
                body |= {"stream": True, "return_token_ids": True}
                got: list[int] = []
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            got += json.loads(line[6:])["choices"][0]["token_ids"]
                        if index % 4 == 0 and len(got) >= 5:
                            return
                assert got == ([9, 10 + index] * num_tokens)[:num_tokens]

            await asyncio.gather(*(one(index) for index in range(64)))
        await until(lambda: not engine.open)
        assert len(engine.aborted) == 16


async def test_a_servers_own_timeout_is_that_of_every_request() -> None:
    engine = ScoringEngine()
    async with live_server(make_llm(engine), ServerSettings(request_timeout_s=9)) as server:
        response = await server.client.post("/v1/completions", json=LONG)
        assert (response.status_code, response.json()["error"]["code"]) == (408, "timeout")
        response = await server.client.post("/v1/completions", json={**LONG, "timeout": 9.5})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "timeout")
    (request,) = engine.requests
    assert request.timeout_s is not None
    assert 5 < request.timeout_s <= 9


async def test_the_sdk_does_not_send_again_what_came_too_late() -> None:
    engine = ScoringEngine()
    async with (
        live_server(make_llm(engine)) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=2) as client,
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            await client.completions.create(
                model=MODEL, prompt="hi", max_tokens=50, extra_body={"timeout": 3}
            )
        assert caught.value.status_code == 408
    assert len(engine.requests) == 1


# --- streams -------------------------------------------------------------------------------------


async def test_keep_alive_comments_while_nothing_comes() -> None:
    engine = ScriptedEngine()
    settings = ServerSettings(keep_alive_s=0.05)
    async with live_server(make_llm(engine), settings) as server:
        engine.pause()
        body = {**LONG, "stream": True, "max_tokens": 2}
        async with server.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200  # though there is no token yet
            lines = response.aiter_lines()
            comments = [line async for line in _take(lines, 4) if line]
            assert comments == [": keep-alive"] * 2
            engine.resume()
            rest = [line async for line in lines if line.startswith("data")]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) == 3


async def _take(lines: AsyncIterator[str], count: int) -> AsyncIterator[str]:
    for _ in range(count):
        yield await anext(lines)


async def test_an_engine_that_dies_in_mid_stream() -> None:
    engine = slow_engine()
    async with live_server(make_llm(engine)) as server:
        body = {**LONG, "stream": True}
        async with server.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            engine.die("the engine process was killed")
            events = [line async for line in lines if line]
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert error["message"] == "the engine process was killed"
        assert error["code"] == "engine_down"
        assert "data: [DONE]" not in events
        assert (await server.client.get("/health")).status_code == 503
        engine.revive()
        assert (await server.client.get("/health")).status_code == 200


# --- bodies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_50_mb_is_refused_without_being_kept(chunked: bool) -> None:
    size, piece = 50_000_000, b" " * 500_000
    process = psutil.Process()
    rss: list[int] = []

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(size // len(piece)):
            rss.append(process.memory_info().rss)
            yield piece

    headers = {"content-type": "application/json"}
    if not chunked:
        headers["content-length"] = str(size)
    async with live_server(make_llm(says("a")), ServerSettings(max_body_bytes=1 << 20)) as server:
        await server.client.get("/health")
        response = await server.client.post("/v1/completions", content=pieces(), headers=headers)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
        assert len(rss) > 10
        assert max(rss) - rss[0] < 15e6
        response = await server.client.post("/v1/completions", json={**LONG, "max_tokens": 1})
        assert response.status_code == 200


# --- starting and stopping -----------------------------------------------------------------------


async def test_it_listens_while_it_loads() -> None:
    may_load = asyncio.Event()

    async def load() -> AsyncLLM:
        await may_load.wait()
        return make_llm(says("a"))

    async with live_server(load) as server:
        response = await server.client.get("/health")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_loading"
        may_load.set()
        for _ in range(100):
            await asyncio.sleep(0.01)
            if (await server.client.get("/health")).status_code == 200:
                return
    raise AssertionError("it never became healthy")


async def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    async def load() -> AsyncLLM:
        await asyncio.sleep(0.05)
        raise CheckpointError("a shard is missing")

    async with live_server(load) as server:
        with pytest.raises(CheckpointError, match="a shard is missing"):
            await server.done


async def test_a_signal_while_loading_cancels_it() -> None:
    cancelled = asyncio.Event()

    async def load() -> AsyncLLM:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        raise AssertionError

    async with live_server(load) as server:
        server.signals.receive()
        await asyncio.wait_for(server.done, 2)
    assert cancelled.is_set()


async def test_draining_lets_streams_end_and_refuses_new_ones() -> None:
    engine = ScriptedEngine(token_delay_s=0.01)
    async with live_server(make_llm(engine)) as server:
        body = {**LONG, "stream": True, "max_tokens": 60}
        async with (
            server.client.stream("POST", "/v1/completions", json=body) as response,
            httpx.AsyncClient(base_url=server.url) as other,
        ):
            lines = response.aiter_lines()
            await anext(lines)
            whole = asyncio.create_task(
                other.post("/v1/completions", json=LONG | {"max_tokens": 50})
            )
            await until(lambda: len(engine.open) == 2)
            server.signals.receive()
            # Longer than sse-starlette's look at the server's state, and than uvicorn's tick.
            await asyncio.sleep(0.1)
            for path in ("/v1/completions", "/v1/chat/completions"):
                refused = await other.post(path, json=LONG)
                assert refused.status_code == 503
                assert refused.headers["retry-after"]
            assert (await other.get("/health")).status_code == 503
            events = [line async for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert len(events) >= 50
        assert (await whole).json()["usage"]["completion_tokens"] == 50
        await asyncio.wait_for(server.done, 2)
        assert not engine.aborted
        with pytest.raises(httpx.ConnectError):
            await server.client.get("/health")


async def test_a_drain_that_takes_too_long_cuts_with_an_error() -> None:
    engine = slow_engine()
    settings = ServerSettings(drain_timeout_s=0.1)
    async with live_server(make_llm(engine), settings) as server:
        body = {**LONG, "stream": True}
        async with server.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            engine.pause()
            server.signals.receive()
            events = [line async for line in lines if line]
        assert json.loads(events[-1][6:])["error"]["code"] == "engine_shutting_down"
        await asyncio.wait_for(server.done, 2)


async def test_a_second_signal_leaves_at_once() -> None:
    engine = slow_engine()
    async with (
        live_server(make_llm(engine)) as server,
        server.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        engine.pause()
        server.signals.receive()
        await asyncio.sleep(0.2)
        assert not server.done.done()
        server.signals.receive()
        await asyncio.wait_for(server.done, 1)
    assert engine.shut_down


def test_a_port_in_use() -> None:
    with bind("127.0.0.1", 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1 port {port}.*--port"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError):
        bind("127.0.0.1", 70_000)
    with pytest.raises(ConfigError):
        bind("no.such.host.invalid", 8000)


# --- OpenAI's SDK --------------------------------------------------------------------------------


@pytest.fixture
async def sdk_server() -> AsyncIterator[LiveServer]:
    engine = says(TEXT)
    settings = ServerSettings(api_keys=("secret",))
    async with live_server(make_llm(engine), settings) as server:
        yield server


async def test_the_async_sdk(sdk_server: LiveServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{sdk_server.url}/v1", api_key="secret") as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        completion = await client.completions.create(model=MODEL, prompt="hi", max_tokens=100)
        assert completion.choices[0].text == TEXT
        chat = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2
        )
        assert chat.choices[0].message.content == TEXT
        assert chat.choices[0].finish_reason == "stop"
        logprobs = chat.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert len(logprobs.content[0].top_logprobs) == 2
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
        assert chunks[-1].usage == chat.usage
        async with client.chat.completions.stream(model=MODEL, messages=MESSAGES) as events:
            final = await events.get_final_completion()
        assert final.choices[0].message.content == TEXT


async def test_the_sync_sdk(sdk_server: LiveServer) -> None:
    def use() -> None:
        with openai.OpenAI(base_url=f"{sdk_server.url}/v1", api_key="secret") as client:
            assert client.models.list().data[0].id == MODEL
            completion = client.completions.create(model=MODEL, prompt="hi", max_tokens=100)
            assert completion.choices[0].text == TEXT
            stream = client.completions.create(
                model=MODEL, prompt=["hi", "you"], max_tokens=100, stream=True
            )
            texts = ["", ""]
            for chunk in stream:
                texts[chunk.choices[0].index] += chunk.choices[0].text
            assert texts == [TEXT, TEXT]
            chat = client.chat.completions.create(model=MODEL, messages=MESSAGES)
            assert chat.choices[0].message.content == TEXT

    await asyncio.to_thread(use)


async def test_errors_reach_the_sdk_as_its_own(sdk_server: LiveServer) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{sdk_server.url}/v1", api_key="secret", max_retries=0
    ) as client:
        arguments: dict[str, Any] = {"model": MODEL, "messages": MESSAGES}
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**arguments, temperature=3)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**arguments, max_tokens=10_000)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(**{**arguments, "model": "gpt"})
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()


async def test_the_sdk_raises_on_a_stream_that_breaks() -> None:
    engine = slow_engine()
    async with (
        live_server(make_llm(engine)) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, max_tokens=100
        )
        await anext(stream)
        engine.die("the engine process was killed")
        with pytest.raises(openai.APIError, match="the engine process was killed"):
            async for _ in stream:
                pass


async def test_the_sdk_tries_again_after_overload() -> None:
    engine = says("a")
    async with (
        live_server(make_llm(engine)) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=1) as client,
    ):
        engine.overloaded = True
        asyncio.get_running_loop().call_later(0.5, setattr, engine, "overloaded", False)
        start_s = time.monotonic()
        answer = await client.completions.create(model=MODEL, prompt="hi")
        assert answer.choices[0].text == "a"
        assert time.monotonic() - start_s > 1.9  # as Retry-After says
