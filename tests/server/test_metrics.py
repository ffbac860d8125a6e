"""/metrics: readable for Prometheus, and the numbers are right."""

from __future__ import annotations

from dataclasses import fields

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmserve.core.stats import EngineStats
from llmserve.openai.observer import AnswerTimes
from llmserve.server.metrics import Metrics
from tests.engines import ScriptedEngine
from tests.openai.models import MODEL, ScoringEngine, says
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


def test_every_number_of_the_engine_is_there() -> None:
    """Each field has a value of its own, so that none can stand for another."""
    metrics = Metrics(MODEL)
    metrics.loaded(3.5)
    numbers = {field.name: 1000 + i for i, field in enumerate(fields(EngineStats))}
    finished = {"stop": 7, "timeout": 9}
    stats = EngineStats(**{**numbers, "finished": finished})  # type: ignore[arg-type]
    values = read(metrics.render(stats).decode())
    names = {
        "num_running_requests": "num_requests_running",
        "num_queued_requests": "num_requests_waiting",
        "max_num_active_requests": "num_requests_max",
        "num_steps": "iterations_total",
        "last_step_s": "iteration_latency_seconds",
        "iter_scheduled_requests": "iteration_scheduled_requests",
        "iter_context_requests": "iteration_context_requests",
        "iter_gen_requests": "iteration_generation_requests",
        "iter_paused_requests": "iteration_paused_requests",
        "iter_context_tokens": "iteration_context_tokens",
        "iter_decoded_tokens": "iteration_decoded_tokens",
        "iter_new_requests": "iteration_new_requests",
        "iter_queue_s": "iteration_new_requests_queue_time_seconds",
        "num_preemptions": "num_preemptions_total",
        "num_completed_requests": "engine_requests_completed_total",
        "max_num_blocks": "kv_cache_blocks_max",
        "free_num_blocks": "kv_cache_blocks_free",
        "used_num_blocks": "kv_cache_blocks_used",
        "cached_num_blocks": "kv_cache_blocks_cached",
        "tokens_per_block": "kv_cache_block_tokens",
        "alloc_total_blocks": "kv_cache_blocks_allocated_total",
        "alloc_new_blocks": "kv_cache_blocks_allocated_new_total",
        "reused_blocks": "kv_cache_blocks_reused_total",
        "missed_blocks": "kv_cache_blocks_missed_total",
        "prefix_cache_queries_tokens": "prefix_cache_queries_total",
        "prefix_cache_hits_tokens": "prefix_cache_hits_total",
        "prompt_tokens": "prompt_tokens_total",
        "generation_tokens": "generation_tokens_total",
        "num_drafts": "spec_decode_num_drafts_total",
        "num_draft_tokens": "spec_decode_num_draft_tokens_total",
        "num_accepted_draft_tokens": "spec_decode_num_accepted_tokens_total",
    }
    assert names.keys() | {"finished"} == numbers.keys()
    for field, name in names.items():
        assert values[f"llmserve:{name}", ""] == numbers[field], name
    for reason, count in finished.items():
        assert values["llmserve:engine_requests_finished_total", reason] == count
    assert values["llmserve:model_load_seconds", ""] == 3.5


def test_shares() -> None:
    stats = EngineStats(
        max_num_blocks=100,
        used_num_blocks=25,
        reused_blocks=30,
        missed_blocks=10,
        iter_gen_requests=4,
        iter_decoded_tokens=10,
    )
    values = read(Metrics(MODEL).render(stats).decode())
    assert values["llmserve:kv_cache_usage_perc", ""] == 0.25
    assert values["llmserve:kv_cache_hit_rate", ""] == 0.75
    assert values["llmserve:iteration_decoded_tokens_per_request", ""] == 2.5
    nothing = read(Metrics(MODEL).render(EngineStats()).decode())
    for name in (
        "kv_cache_usage_perc",
        "kv_cache_hit_rate",
        "iteration_decoded_tokens_per_request",
    ):
        assert nothing[f"llmserve:{name}", ""] == 0


async def test_a_timeout_is_counted_as_one() -> None:
    server = Server(ScoringEngine()).load()
    async with server.client as client:
        for streamed in (False, True):
            body = {**COMPLETION, "timeout": 4, "n": 2, "stream": streamed}
            await client.post("/v1/completions", json=body)
        values = read((await client.get("/metrics")).text)
    assert values["llmserve:request_success_total", "timeout"] == 4
    assert values["llmserve:request_success_total", "error"] == 0


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
