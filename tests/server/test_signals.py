"""SIGTERM and Ctrl-C, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from tests.openai.models import MODEL

SERVER = """
import asyncio
from llmserve.server.run import bind, run_server
from llmserve.server.settings import ServerSettings
from tests.engines import ScriptedEngine
from tests.openai.models import MODEL, make_llm

async def load():
    return make_llm(ScriptedEngine(token_delay_s=0.02))

sock = bind("127.0.0.1", 0)
port = sock.getsockname()[1]
ready = lambda llm: print(port, flush=True)
asyncio.run(run_server(load, MODEL, ServerSettings(), sock, on_ready=ready))
"""


@asynccontextmanager
async def server_process() -> AsyncIterator[tuple[Process, httpx.AsyncClient]]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, stdout=PIPE)
    assert process.stdout is not None
    try:
        port = int(await process.stdout.readline())
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            yield process, client
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_sigterm_lets_a_stream_end() -> None:
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 75, "stream": True}
    async with server_process() as (process, client):
        async with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            process.send_signal(signal.SIGTERM)
            # 1.5 s more: sse-starlette looks every 0.5 s whether to cut its streams.
            events = [line async for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert await asyncio.wait_for(process.wait(), 5) == 0


async def test_a_second_ctrl_c_leaves_at_once() -> None:
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 250, "stream": True}
    async with (
        server_process() as (process, client),
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        process.send_signal(signal.SIGINT)
        await asyncio.sleep(0.3)
        assert process.returncode is None
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 2) == 0
