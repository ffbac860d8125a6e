"""/metrics: readable for Prometheus, and the numbers are right."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmserve.core.stats import EngineStats
from llmserve.openai.observer import AnswerTimes
from llmserve.server.metrics import Metrics
from tests.engines import ScriptedEngine
from tests.openai.models import MODEL, says
from tests.server.test_http import CHAT, COMPLETION, Server


def read(text: str) -> dict[tuple[str, str], float]:
    """Sample values by (name, finished_reason or le)."""
    return {
        (sample.name, sample.labels.get("finished_reason", sample.labels.get("le", ""))): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_counts_of_real_requests() -> None:
    engine = says("one two three")
    server = Server(engine).load()
    async with server.client as client:
        first = (await client.post("/v1/completions", json={**COMPLETION, "n": 2})).json()
        await client.post("/v1/chat/completions", json={**CHAT, "stream": True, "max_tokens": 2})
        await client.post("/v1/completions", json={**COMPLETION, "max_tokens": 10**6})
        values = read((await client.get("/metrics")).text)
    tokens = first["usage"]["completion_tokens"] + 2
    assert values["llmserve:request_success_total", "stop"] == 2
    assert values["llmserve:request_success_total", "length"] == 1
    assert values["llmserve:request_success_total", "abort"] == 0
    assert values["llmserve:time_to_first_token_seconds_count", ""] == 3
    assert values["llmserve:inter_token_latency_seconds_count", ""] == tokens - 3
    assert values["llmserve:e2e_request_latency_seconds_count", ""] == 3
    assert values["llmserve:request_generation_tokens_sum", ""] == tokens
    assert values["llmserve:generation_tokens_total", ""] == tokens
    assert values["process_start_time_seconds", ""] > 1e9


async def test_an_aborted_stream_is_counted() -> None:
    server = Server(ScriptedEngine()).load()
    async with server.client as client:
        serving = server.state.require_serving()
        chunks = await serving.create_completion({**COMPLETION, "stream": True}, "r")
        await anext(chunks)  # type: ignore[arg-type]
        await chunks.aclose()  # type: ignore[union-attr]
        values = read((await client.get("/metrics")).text)
    assert values["llmserve:request_success_total", "abort"] == 1


def test_the_engines_numbers() -> None:
    metrics = Metrics(MODEL)
    metrics.loaded(3.5)
    stats = EngineStats(
        num_running_requests=3,
        num_queued_requests=4,
        num_preemptions=5,
        max_num_blocks=100,
        used_num_blocks=25,
        prompt_tokens=600,
        generation_tokens=70,
        prefix_cache_queries_tokens=600,
        prefix_cache_hits_tokens=80,
    )
    values = read(metrics.render(stats).decode())
    for name, expected in {
        "num_requests_running": 3,
        "num_requests_waiting": 4,
        "num_preemptions_total": 5,
        "kv_cache_usage_perc": 0.25,
        "prompt_tokens_total": 600,
        "generation_tokens_total": 70,
        "prefix_cache_queries_total": 600,
        "prefix_cache_hits_total": 80,
        "model_load_seconds": 3.5,
    }.items():
        assert values[f"llmserve:{name}", ""] == expected, name


def test_the_times_of_an_answer() -> None:
    metrics = Metrics(MODEL)
    metrics.finished(
        AnswerTimes(
            finish_reason="stop",
            prompt_tokens=10,
            generation_tokens=5,
            queue_s=1.0,
            first_token_s=3.0,
            end_s=7.0,
        )
    )
    values = read(metrics.render(EngineStats()).decode())
    for name, expected in {
        "request_queue_time_seconds": 1.0,
        "request_prefill_time_seconds": 2.0,
        "request_decode_time_seconds": 4.0,
        "request_time_per_output_token_seconds": 1.0,
        "e2e_request_latency_seconds": 7.0,
        "request_prompt_tokens": 10,
        "request_generation_tokens": 5,
    }.items():
        assert values[f"llmserve:{name}_sum", ""] == pytest.approx(expected), name
    assert values["llmserve:e2e_request_latency_seconds_bucket", "5.0"] == 0
    assert values["llmserve:e2e_request_latency_seconds_bucket", "10.0"] == 1


async def test_metrics_are_there_without_an_engine() -> None:
    server = Server()
    async with server.client as client:
        values = read((await client.get("/metrics")).text)
        assert values["llmserve:num_requests_running", ""] == 0
        server.load()
        server.engine.die()
        assert (await client.get("/metrics")).status_code == 200
