#!/usr/bin/env python3
"""Measures the time between steps that is not model time.

    python scripts/bench_overlap.py --check

The model only waits: a step takes --step-ms and no core, as on a GPU. A number of sequences decode
together, and what lies between the ends of two steps beyond --step-ms is what scheduling, taking in
tokens, messages and streams cost: all of it runs while a step computes, or it shows here. The
model's runner takes the time itself (its tokens are microseconds). Measured twice, on the engine
core in this process and through the engine's own process (messages, streams, a task per request
that reads them).

Prints the hardware, a table, and one JSON line last. With --check the exit code is 1 if the median
overhead at 256 sequences, or fewer, is 2 ms or more. (Medians, for means are what else the machine
does; they are shown beside them.)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import describe_machine

from llmserve.config import BuildConfig, EngineConfig
from llmserve.core.request import Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.engine.native import EngineCore
from llmserve.engine.process import OutputStream, ProcessEngine
from llmserve.engine.runner_spec import IdleRunnerSpec

MAX_OVERHEAD_MS = 2.0
CHECKED_SEQUENCES = 256
PROMPT_TOKENS = 16
BUILD = BuildConfig(max_batch_size=1024, max_num_tokens=16384, max_seq_len=1024)
CONFIG = EngineConfig()


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    host = describe_machine("pyzmq", "msgspec", "llmserve", load=round(os.getloadavg()[0], 2))
    print(", ".join(f"{key} {value}" for key, value in host.items()), flush=True)
    rows = []
    for step_ms in args.step_ms:
        for sequences in args.sequences:
            rows.append(measure_core(sequences, step_ms, args.steps))
            _print(rows[-1])
            rows.append(asyncio.run(measure_process(sequences, step_ms, args.steps)))
            _print(rows[-1])
    missed = [
        f"{row['through']}, {row['sequences']} sequences, {row['step_ms']:g} ms a step"
        for row in rows
        if row["sequences"] <= CHECKED_SEQUENCES and row["overhead_ms"]["p50"] >= MAX_OVERHEAD_MS
    ]
    print(json.dumps({"host": host, "rows": rows, "missed": missed}))
    return 1 if args.check and missed else 0


def measure_core(sequences: int, step_ms: float, steps: int) -> dict[str, Any]:
    """Drive an ``EngineCore`` in this process."""
    runner, limits = _spec(step_ms).load(CONFIG)
    core = EngineCore(runner, limits, CONFIG)
    for request in _requests(sequences, steps):
        core.add_request(request)
    answers: dict[str, list[int]] = {}
    while core.has_unfinished_requests():
        for output in core.step():
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    core.shutdown()
    return _row("core", sequences, step_ms, list(answers.values()))


async def measure_process(sequences: int, step_ms: float, steps: int) -> dict[str, Any]:
    """Drive a ``ProcessEngine``, with a task that reads each stream."""
    engine = ProcessEngine(Path("unused"), CONFIG, runner=_spec(step_ms))
    await engine.start()
    try:
        streams = [engine.submit(request) for request in _requests(sequences, steps)]
        answers = await asyncio.gather(*map(_read, streams))
    finally:
        await engine.shutdown()
    return _row("process", sequences, step_ms, answers)


async def _read(stream: OutputStream) -> list[int]:
    return [token_id async for output in stream for token_id in output.token_ids]


def _row(through: str, sequences: int, step_ms: float, answers: list[list[int]]) -> dict[str, Any]:
    # While the first answer goes on, and the prompts are done, all decode together.
    late_ms = [token / 1000 for token in answers[0][8:-2]]
    return {
        "through": through,
        "sequences": sequences,
        "step_ms": step_ms,
        "overhead_ms": {
            "mean": round(statistics.fmean(late_ms), 3),
            "p50": round(statistics.median(late_ms), 3),
            "p99": round(statistics.quantiles(late_ms, n=100)[98], 3),
        },
    }


def _spec(step_ms: float) -> IdleRunnerSpec:
    return IdleRunnerSpec(build=BUILD, step_s=step_ms / 1000)


def _requests(sequences: int, steps: int) -> Iterator[Request]:
    for i in range(sequences):
        yield Request(
            request_id=f"request-{i}",
            prompt_token_ids=tuple((7 * i + j) % 256 for j in range(PROMPT_TOKENS)),
            sampling_params=SamplingParams(max_tokens=steps, seed=0),
        )


def _print(row: dict[str, Any]) -> None:
    values = ", ".join(f"{name} {value:.2f}" for name, value in row["overhead_ms"].items())
    print(
        f"{row['through']:8} {row['sequences']:5} sequences, {row['step_ms']:3g} ms a step: "
        f"{values} ms between steps",
        flush=True,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 256, 1000])
    parser.add_argument("--step-ms", type=float, nargs="+", default=[5.0, 20.0])
    parser.add_argument("--steps", type=int, default=200, help="steps of each measurement")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
