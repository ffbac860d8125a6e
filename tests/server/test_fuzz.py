"""Bytes on the wire: no body makes the server fail."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.openai.test_fuzz import FUZZ, VALUES, bodies
from tests.server.test_http import CHAT, COMPLETION, Server

FIELDS = {"temperature", "n", "stop", "stream", "max_tokens", "logprobs", "stream_options"}


def post(path: str, content: bytes) -> httpx.Response:
    async def send() -> httpx.Response:
        server = Server().load()
        async with server.client as client:
            response = await client.post(
                path, content=content, headers={"content-type": "application/json"}
            )
        assert not server.engine.open
        return response

    return asyncio.run(send())


def check(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@settings(FUZZ, max_examples=100)
@given(st.binary(max_size=60), st.integers(0, 80))
def test_broken_json(noise: bytes, position: int) -> None:
    content = json.dumps(COMPLETION).encode()
    check(post("/v1/completions", content[:position] + noise + content[position:]))


@settings(FUZZ, max_examples=100)
@given(bodies(FIELDS, ("model", "prompt")), st.dictionaries(st.sampled_from(list(FIELDS)), VALUES))
def test_json(body: Any, more: dict[str, Any]) -> None:
    check(post("/v1/completions", json.dumps(body).encode()))
    check(post("/v1/chat/completions", json.dumps({**CHAT, **more}).encode()))
