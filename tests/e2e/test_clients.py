"""What clients do to a server: stream, all at once, leave midway, and send nonsense."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.serving import Server, resident_bytes

NUMBERS = {7: "sept", 12: "douze", 40: "quarante", 300: "trois cents", 1000: "mille"}
ENGLISH = {
    7: "seven",
    12: "twelve",
    40: "forty",
    300: "three hundred",
    1000: "one thousand",
}


def question(number: int) -> str:
    return f"Translate to French: {ENGLISH[number]}"


def test_the_sdk_streams_and_waits_and_both_give_the_right_answer(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for number, french in NUMBERS.items():
            messages: Any = [{"role": "user", "content": question(number)}]
            whole = client.chat.completions.create(model="demo", messages=messages, temperature=0)
            assert whole.choices[0].message.content == french
            assert whole.choices[0].finish_reason == "stop"
            with client.chat.completions.create(
                model="demo",
                messages=messages,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            ) as stream:
                chunks = list(stream)
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            assert text == french
            usage = chunks[-1].usage
            assert usage is not None
            # The second of two equal prompts finds all of it in the cache but the last token.
            cached = usage.prompt_tokens_details
            assert cached is not None
            assert cached.cached_tokens == usage.prompt_tokens - 1
            assert usage.model_copy(update={"prompt_tokens_details": None}) == (
                whole.usage.model_copy(update={"prompt_tokens_details": None})
            )


async def test_the_async_sdk_streams_many_at_once(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

        async def ask(number: int) -> str:
            messages: Any = [{"role": "user", "content": question(number)}]
            stream = await client.chat.completions.create(
                model="demo", messages=messages, temperature=0, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        numbers = list(NUMBERS) * 4
        answers = await asyncio.gather(*map(ask, numbers))
    assert answers == [NUMBERS[number] for number in numbers]


async def stream_events(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))


async def run_client(
    client: httpx.AsyncClient, prompt: str, max_tokens: int, leave_after: int | None
) -> str | None:
    """One streaming client. Returns its text, or None if it left midway."""
    body = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    text, events = "", stream_events(client, body)
    try:
        number = 0
        async for event in events:
            assert "error" not in event, event
            text += event["choices"][0]["text"]
            number += 1
            if number == leave_after:
                return None
    finally:
        await events.aclose()  # type: ignore[attr-defined]
    return text


async def test_64_clients_of_mixed_lengths_one_in_four_leaving(float32_server: Server) -> None:
    """The others get the text they get alone; blocks return to zero; memory does not grow."""
    server = float32_server
    draw = random.Random(0)
    words = ["seven", "twelve", "order", "Anna", "March", "invoice", "ready", "fourteen"]
    clients = [
        (
            f"{index}: " + " ".join(draw.choices(words, k=draw.choice((2, 20, 150)))),
            # Who leaves after the first events must have more to come.
            draw.choice((30, 120) if index % 4 == 0 else (4, 30, 120)),
            draw.randint(1, 3) if index % 4 == 0 else None,
        )
        for index in range(64)
    ]
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        alone = [
            await run_client(client, prompt, max_tokens, None)
            for prompt, max_tokens, _ in clients[1:24:4]
        ]
        resident = []
        first: list[str | None] = []
        for _ in range(5):
            texts = await asyncio.gather(*(run_client(client, *each) for each in clients))
            assert [text is None for text in texts] == [index % 4 == 0 for index in range(64)]
            assert texts[1:24:4] == alone
            first = first or texts
            assert texts == first
            for _ in range(100):
                used = server.metric("llmserve:kv_cache_usage_perc")
                if used == 0:
                    break
                await asyncio.sleep(0.05)
            assert used == 0
            resident.append(
                resident_bytes(server.engine_pid()) + resident_bytes(server.process.pid)
            )
    # The first rounds fill allocators' arenas and touch KV blocks; after that it stays level.
    assert resident[-1] <= resident[1] * 1.02 + (8 << 20), resident


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"max_tokens": 4000, "prompt": "a"}, 400, None, "context_length_exceeded"),
        ({"prompt": "one two " * 4000}, 400, None, "context_length_exceeded"),
        ({"prompt": "a", "temperature": 3}, 400, "temperature", None),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature", None),
        ({"prompt": "a", "temprature": 1}, 400, "temprature", None),
        ({"prompt": "a", "logit_bias": {"5": 101}}, 400, "logit_bias", None),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix", None),
        ({"prompt": []}, 400, "prompt", None),
        ({"prompt": "a", "model": "another"}, 404, "model", "model_not_found"),
    ],
)
def test_bad_requests_get_their_error_and_the_engine_goes_on(
    server: Server, body: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    response = httpx.post(f"{server.url}/v1/completions", json={"model": "demo"} | body, timeout=30)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    good = {"model": "demo", "prompt": "a", "max_tokens": 2}
    assert httpx.post(f"{server.url}/v1/completions", json=good, timeout=30).status_code == 200


def test_malformed_json_and_a_50_mb_body(server: Server) -> None:
    url = f"{server.url}/v1/completions"
    json_type = {"content-type": "application/json"}
    broken = httpx.post(url, content=b'{"model": "demo", ', headers=json_type)
    assert (broken.status_code, broken.json()["error"]["type"]) == (400, "invalid_request_error")
    try:
        large = httpx.post(url, content=b" " * 50_000_000, headers=json_type, timeout=60)
    except httpx.WriteError:  # the server may close before all of it is sent
        pass
    else:
        assert large.status_code == 413
        assert large.json()["error"]["message"]
    assert server.health() == 200
