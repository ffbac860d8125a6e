"""Jobs through the OpenAI layer, with an engine that follows a script."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmserve.batch.format import seed_of
from llmserve.batch.job import BatchResult, run_job
from llmserve.batch.responder import EngineResponder
from llmserve.core.request import BATCH_PRIORITY, INTERACTIVE_PRIORITY
from llmserve.llm import AsyncLLM
from llmserve.tokenizer import GenerationConfig, Tokenizer
from tests.batch.jobs import MODEL, chat_line, make_job, read_lines, write_jobs
from tests.engines import ScriptedEngine
from tests.openai.models import ScoringEngine
from tests.tokenizer_files import write_tokenizer


def completion_line(custom_id: str, prompt: str, **body: Any) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": MODEL, "prompt": prompt, **body},
    }


async def run_with(engine: ScriptedEngine, directory: Path, **changes: Any) -> BatchResult:
    tokenizer_dir = write_tokenizer(directory / "tokenizer")
    tokenizer = Tokenizer.from_directory(tokenizer_dir)
    generation_config = GenerationConfig.from_directory(tokenizer_dir, tokenizer)
    llm = AsyncLLM(engine, tokenizer, generation_config)

    @contextlib.asynccontextmanager
    async def open_responder() -> AsyncIterator[EngineResponder]:
        await engine.start()
        yield EngineResponder(llm, MODEL)

    return await run_job(make_job(directory, **changes), open_responder)


async def test_chat_and_completions_round_trip(tmp_path: Path) -> None:
    write_jobs(
        tmp_path / "jobs.jsonl",
        [
            completion_line("text", "the quick brown fox", max_tokens=8),
            chat_line("chat", "hello world", max_tokens=4, temperature=0.7, seed=11),
            completion_line("two", "one two three", max_tokens=4, n=2),
        ],
    )
    engine = ScriptedEngine()
    result = await run_with(engine, tmp_path)
    assert (result.total, result.failed) == (3, 0)
    text, chat, two = read_lines(tmp_path / "answers.jsonl")
    # The scripted engine repeats the prompt.
    assert "the quick brown fox".startswith(text["response"]["body"]["choices"][0]["text"][:8])
    assert text["response"]["body"]["object"] == "text_completion"
    assert text["response"]["body"]["model"] == MODEL
    assert text["response"]["body"]["usage"]["completion_tokens"] == 8
    assert chat["response"]["body"]["object"] == "chat.completion"
    assert chat["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert len(two["response"]["body"]["choices"]) == 2
    seeds = {request.sampling_params.seed for request in engine.requests}
    assert seeds == {11, seed_of("text"), seed_of("two")}


async def test_lines_take_what_interactive_requests_leave(tmp_path: Path) -> None:
    lines = [completion_line("plain", "one"), completion_line("urgent", "two", priority=-1)]
    write_jobs(tmp_path / "jobs.jsonl", lines)
    for backend, priority in (("native", BATCH_PRIORITY), ("tensorrt-llm", INTERACTIVE_PRIORITY)):
        engine = ScriptedEngine()
        engine._info = replace(engine.info, backend=backend)
        await run_with(engine, tmp_path, output_path=tmp_path / f"{backend}.jsonl")
        assert [request.priority for request in engine.requests] == [priority, -1]
    assert BATCH_PRIORITY > INTERACTIVE_PRIORITY


async def test_a_line_that_came_too_late_is_a_failed_one(tmp_path: Path) -> None:
    lines = [completion_line("late", "one", timeout=3), completion_line("good", "two")]
    write_jobs(tmp_path / "jobs.jsonl", lines)
    engine = ScoringEngine()
    result = await run_with(engine, tmp_path)
    assert (result.total, result.failed) == (2, 1)
    [late] = read_lines(tmp_path / "errors.jsonl")
    assert late["response"]["status_code"] == 408
    assert late["response"]["body"]["error"]["code"] == "timeout"
    assert len(engine.requests) == 2  # and was not tried again


async def test_a_requests_own_faults_go_to_the_error_file_and_are_not_tried_again(
    tmp_path: Path,
) -> None:
    write_jobs(
        tmp_path / "jobs.jsonl",
        [
            completion_line("hot", "a", temperature=99),
            completion_line("odd", "a", colour="blue"),
            completion_line("long", "the " * 400),
            completion_line("good", "a"),
        ],
    )
    result = await run_with(ScriptedEngine(), tmp_path)
    assert (result.total, result.failed) == (4, 3)
    [good] = read_lines(tmp_path / "answers.jsonl")
    assert good["custom_id"] == "good"
    hot, odd, long = read_lines(tmp_path / "errors.jsonl")
    assert hot["response"]["status_code"] == 400
    assert hot["response"]["body"]["error"]["param"] == "temperature"
    assert odd["response"]["body"]["error"]["param"] == "colour"
    assert long["response"]["body"]["error"]["code"] == "context_length_exceeded"


async def test_an_engine_that_dies_in_mid_job_and_comes_back(tmp_path: Path) -> None:
    names = [f"{i}" for i in range(12)]
    lines = [completion_line(name, f"one {name} two", max_tokens=5) for name in names]
    write_jobs(tmp_path / "jobs.jsonl", lines)
    engine = ScriptedEngine()
    engine.die_after_tokens = 27

    async def bring_back() -> None:
        while engine.dead is None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        engine.revive()

    back = asyncio.create_task(bring_back())
    result = await run_with(engine, tmp_path, retry_pause_s=0.002)
    await back
    assert (result.total, result.failed) == (12, 0)
    answers = read_lines(tmp_path / "answers.jsonl")
    assert [answer["custom_id"] for answer in answers] == names
    assert {answer["response"]["body"]["usage"]["completion_tokens"] for answer in answers} == {5}
    # Four were in flight when it died, and only those were computed again.
    assert 12 < len(engine.requests) <= 16
    assert not engine.open


async def test_overload_is_waited_out(tmp_path: Path) -> None:
    lines = [completion_line(f"{i}", "one two", max_tokens=2) for i in range(8)]
    write_jobs(tmp_path / "jobs.jsonl", lines)
    engine = ScriptedEngine(max_queue_size=2)
    result = await run_with(engine, tmp_path, concurrency=8)
    assert (result.total, result.failed) == (8, 0)
    assert len(engine.requests) == 8


async def test_a_resumed_job_asks_the_engine_for_the_same(tmp_path: Path) -> None:
    """Same seeds, so the same answers, whichever run computes a line."""
    lines = [completion_line(f"{i}", "one", max_tokens=3, temperature=1.0) for i in range(6)]
    seeds: list[dict[str, int | None]] = []
    for directory, after in ((tmp_path / "a", None), (tmp_path / "b", 7)):
        directory.mkdir()
        write_jobs(directory / "jobs.jsonl", lines)
        engine = ScriptedEngine()
        engine.die_after_tokens = after
        with contextlib.suppress(Exception):
            await run_with(engine, directory, engine_timeout_s=0.01, concurrency=2)
        if after is not None:
            assert not (directory / "answers.jsonl").exists()
            engine.revive()
            await run_with(engine, directory)
        answers = {
            answer["custom_id"]: json.dumps(answer["response"]["body"]["choices"])
            for answer in read_lines(directory / "answers.jsonl")
        }
        assert len(answers) == 6
        seeds.append({})
        for request in engine.requests:
            seeds[-1][request.request_id] = request.sampling_params.seed
    assert set(seeds[0].values()) == set(seeds[1].values()) == {seed_of(f"{i}") for i in range(6)}
