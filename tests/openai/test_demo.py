"""The API over the demo model in its own process: what the engine has to do for a field."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from llmserve.artifacts import ensure_engine
from llmserve.config import EngineConfig, KvCacheConfig, NGramDecodingConfig
from llmserve.errors import RequestTimeoutError
from llmserve.llm.async_llm import open_engine
from llmserve.openai.serving import OpenAIServing
from llmserve.server.metrics import Metrics
from tests.openai.models import MODEL

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
MESSAGES = [{"role": "user", "content": "Translate to French: three hundred"}]
ANSWER = "trois cents"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OpenAIServing]:
    cache_dir = tmp_path_factory.mktemp("cache")
    engine_dir = await asyncio.to_thread(ensure_engine, DEMO, dtype="float32", cache_dir=cache_dir)
    # Blocks so short that two prompts have some in common.
    cache = KvCacheConfig(tokens_per_block=4, max_tokens=4096)
    config = EngineConfig(kv_cache=cache, speculative=NGramDecodingConfig(), threads=1)
    llm = await open_engine(engine_dir, engine_config=config)
    yield OpenAIServing(llm, MODEL)
    await llm.engine.shutdown()


async def complete(api: OpenAIServing, prompt: Any, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, **fields}
    return dict(msgspec.to_builtins(await api.create_completion(body, "r")))


async def chat(api: OpenAIServing, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": MESSAGES, "temperature": 0, **fields}
    return dict(msgspec.to_builtins(await api.create_chat_completion(body, "r")))


def content(answer: dict[str, Any]) -> str:
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"])


async def test_echoed_logprobs_are_those_that_the_tokens_were_generated_with(
    api: OpenAIServing,
) -> None:
    fields = {"logprobs": 3, "return_token_ids": True}
    said = (await complete(api, "Translate", max_tokens=24, **fields))["choices"][0]
    whole = [*said["prompt_token_ids"], *said["token_ids"]]
    echoed = (await complete(api, [whole], max_tokens=1, echo=True, **fields))["choices"][0]
    told, generated = echoed["logprobs"], said["logprobs"]
    num_said = len(said["token_ids"])
    assert len(told["tokens"]) == len(whole) + 1
    assert told["tokens"][-num_said - 1 : -1] == generated["tokens"]
    assert told["token_logprobs"][-num_said - 1 : -1] == pytest.approx(
        generated["token_logprobs"], abs=1e-4
    )
    for ours, theirs in zip(
        told["top_logprobs"][-num_said - 1 : -1], generated["top_logprobs"], strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-4)
    # Greedy, so each one's own is the likeliest.
    assert generated["token_logprobs"] == [max(top.values()) for top in generated["top_logprobs"]]


async def test_prompt_logprobs_do_not_depend_on_the_prefix_cache(api: OpenAIServing) -> None:
    first = await chat(api, prompt_logprobs=2, max_tokens=1)
    again = await chat(api, prompt_logprobs=2, max_tokens=1)
    assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert len(again["prompt_logprobs"]) == again["usage"]["prompt_tokens"]
    for one, other in zip(first["prompt_logprobs"][1:], again["prompt_logprobs"][1:], strict=True):
        assert one.keys() == other.keys()
        for token_id in one:
            assert one[token_id]["logprob"] == pytest.approx(other[token_id]["logprob"], abs=1e-4)


async def test_answers_match_what_they_must(api: OpenAIServing) -> None:
    properties = {"word": {"enum": ["trois", "cents"]}, "count": {"type": "boolean"}}
    schema = {
        "type": "object",
        "properties": properties,
        "required": ["word", "count"],
        "additionalProperties": False,
    }
    json_schema = {"name": "number", "schema": schema, "strict": True}
    response_format = {"type": "json_schema", "json_schema": json_schema}
    for temperature in (0.0, 1.0):
        fields = {"temperature": temperature, "max_tokens": 60}
        answer = json.loads(content(await chat(api, response_format=response_format, **fields)))
        assert answer["word"] in ("trois", "cents")
        assert isinstance(answer["count"], bool)
        assert set(answer) == {"word", "count"}
        assert content(await chat(api, guided_choice=["neuf", "dix"], **fields)) in ("neuf", "dix")
        code = content(await chat(api, guided_regex="[0-9]{3}-[a-z]{2}", **fields))
        assert re.fullmatch("[0-9]{3}-[a-z]{2}", code)
        shout = content(await chat(api, guided_grammar='start: "hé" | "ho" "!"', **fields))
        assert shout in ("hé", "ho!")


async def test_a_biased_token_comes_or_does_not(api: OpenAIServing) -> None:
    tokenizer = api.llm.tokenizer
    (token_id,) = tokenizer.encode("!", add_special_tokens=False)
    forced = await complete(api, "Hello", logit_bias={str(token_id): 100}, max_tokens=5)
    assert forced["choices"][0]["text"] == "!!!!!"
    assert content(await chat(api)) == ANSWER
    first = tokenizer.encode(ANSWER, add_special_tokens=False)[0]
    banned = await chat(api, logit_bias={str(first): -100}, max_tokens=10, return_token_ids=True)
    assert first not in banned["choices"][0]["token_ids"]


async def test_an_answer_has_min_tokens(api: OpenAIServing) -> None:
    plain = await chat(api)
    num_tokens = plain["usage"]["completion_tokens"]
    longer = await chat(api, min_tokens=num_tokens + 8, max_tokens=num_tokens + 30)
    assert longer["usage"]["completion_tokens"] >= num_tokens + 8
    assert longer["choices"][0]["message"]["content"].startswith(ANSWER)
    # The token that ends it counts among them.
    assert content(await chat(api, min_tokens=num_tokens - 1)) == ANSWER


async def test_a_salt_keeps_caches_apart(api: OpenAIServing) -> None:
    prompt = list(range(40, 80))
    cached = []
    for salt in ("a", "a", "b", None, "b"):
        answer = await complete(api, prompt, cache_salt=salt, max_tokens=1)
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert [num > 0 for num in cached] == [False, True, False, False, True]


async def test_a_request_that_takes_too_long(api: OpenAIServing) -> None:
    body = {"max_tokens": 1000, "ignore_eos": True, "timeout": 0.05}
    with pytest.raises(RequestTimeoutError, match=r"0\.05 s"):
        await complete(api, "Hello", **body)
    assert content(await chat(api)) == ANSWER


async def test_metrics_count_what_was_done(api: OpenAIServing) -> None:
    metrics = Metrics(MODEL)

    async def read() -> dict[tuple[str, str], float]:
        text = metrics.render(await api.llm.engine.stats()).decode()
        return {
            (sample.name.removeprefix("llmserve:"), sample.labels.get("finished_reason", "")): (
                sample.value
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("llmserve:")
        }

    async def settled() -> dict[tuple[str, str], float]:
        """The engine tells its numbers a few times a second, and when it becomes idle."""
        async with asyncio.timeout(20):
            while True:
                before = await read()
                await asyncio.sleep(0.3)
                if (now := await read()) == before and now["num_requests_running", ""] == 0:
                    return now

    before = await settled()
    prompt = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    for _ in range(2):
        answer = await complete(api, prompt, max_tokens=6, ignore_eos=True, n=2)
        assert answer["usage"]["completion_tokens"] == 12
    with pytest.raises(RequestTimeoutError):
        await complete(api, [7], max_tokens=1000, ignore_eos=True, timeout=0.02)
    after = await settled()

    def grown(name: str, reason: str = "") -> float:
        return after.get((name, reason), 0) - before.get((name, reason), 0)

    assert grown("prompt_tokens_total") == 4 * len(prompt) + 1
    assert grown("generation_tokens_total") >= 24
    assert grown("engine_requests_completed_total") == 5
    assert grown("engine_requests_finished_total", "length") == 4
    assert grown("engine_requests_finished_total", "timeout") == 1
    assert grown("iterations_total") >= 12
    # The second time its two full blocks were there, for both answers.
    assert grown("prefix_cache_hits_total") >= 2 * 8
    assert grown("prefix_cache_queries_total") == 4 * len(prompt) + 1
    assert grown("kv_cache_blocks_reused_total") >= 4
    assert after["kv_cache_blocks_used", ""] == 0
    assert after["kv_cache_block_tokens", ""] == 4
    assert after["kv_cache_blocks_max", ""] == after["kv_cache_blocks_free", ""]
    assert after["num_requests_waiting", ""] == 0
    drafted, right = (
        after[f"spec_decode_num_{name}_tokens_total", ""] for name in ("draft", "accepted")
    )
    assert 0 <= right <= drafted
