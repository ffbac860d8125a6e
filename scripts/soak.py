#!/usr/bin/env python3
"""Serves twice the load that the machine can, for a long time, with everything that goes wrong.

    python scripts/soak.py --minutes 30 --engine checkpoints/demo-engine
    python scripts/soak.py --minutes 30                 a fake model, whose answers are known

First measures what the engine can serve, then sends twice as many requests for as long as asked,
whether they are answered or not: short and long ones over shared beginnings, of several priorities,
siblings of one prompt, with log-probabilities, guided, with timeouts; some that cannot be served;
some aborted, left, or cancelled while they run. Now and then the engine's process is killed.

What must hold: every request that was taken has exactly one terminal event, and every refused one
its error; the engine dies when it is killed and not otherwise; the memory of both processes stays
flat; when all is over no block is held, and the engine answers.

Prints a line now and then, a report, and one JSON line last; the exit code is 1 if any of it does
not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from machine import describe_machine

from llmserve.config import BuildConfig, EngineConfig, KvCacheConfig
from llmserve.core.request import FinishReason, Output, Request
from llmserve.core.sampling_params import GuidedDecodingParams, SamplingParams
from llmserve.engine.process import OutputStream, ProcessEngine
from llmserve.engine.runner_spec import FakeRunnerSpec, TorchRunnerSpec
from llmserve.errors import EngineDeadError, InvalidRequestError, LlmserveError
from llmserve.runtime.fake import expected_tokens

TOKENIZER = Path(__file__).parents[1] / "checkpoints" / "demo" / "tokenizer.json"
OVERLOAD = 2.0
MAX_QUEUE_SIZE = 64
MAX_GROWTH = 0.1  # of a process's memory, from its second quarter to its last
MAX_GROWTH_BYTES = 24 * 2**20  # or so much: allocators take it in pieces
WARM_UP_SAMPLES = 8  # a life with fewer samples says nothing of growth
SAMPLE_S = 0.5
PROMPT_TOKENS = 48
MAX_TOKENS = 48
GUIDES = (
    GuidedDecodingParams(choice=("yes", "no", "perhaps")),
    GuidedDecodingParams(regex="[a-z]{1,8}( [a-z]{1,8}){0,3}"),
    GuidedDecodingParams(json='{"type": "array", "items": {"type": "boolean"}, "maxItems": 4}'),
)


def main() -> int:
    """Run the soak; returns the exit code."""
    args = _arguments()
    host = describe_machine("torch", "pyzmq", "llguidance", "llmserve")
    print(", ".join(f"{key} {value}" for key, value in host.items()), flush=True)
    report = asyncio.run(soak(args))
    print(json.dumps({"host": host} | report))
    return 1 if report["wrong"] else 0


class CountingEngine(ProcessEngine):
    """Counts the ends that the engine reports: each request that was taken has one.

    Attributes:
        num_taken: Requests it took.
        open_ids: Of these, those that have not ended.
        num_ended: Ends reported.
        doubled: Ends of requests that had ended, or never were.
        num_deaths: How often the process died, for whatever reason.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.num_taken = 0
        self.open_ids: set[str] = set()
        self.num_ended = 0
        self.doubled: list[str] = []
        self.num_deaths = 0

    def submit(self, request: Request) -> OutputStream:
        """Submit, and count it as open."""
        stream = super().submit(request)
        self.num_taken += 1
        self.open_ids.add(request.request_id)
        return stream

    def _end(self, request_id: str, last: Output | LlmserveError) -> None:
        self.num_ended += 1
        if request_id in self.open_ids:
            self.open_ids.remove(request_id)
        else:
            self.doubled.append(request_id)
        super()._end(request_id, last)

    def _leave_service(self, reason: str) -> None:
        self.num_deaths += 1
        super()._leave_service(reason)


@dataclass
class Books:
    """What became of the requests.

    Attributes:
        outcomes: Requests by how they ended, as their clients saw it.
        wrong: What must not be.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def complain(self, words: str) -> None:
        """Note what is wrong; the first few of it suffice."""
        if len(self.wrong) < 20:
            self.wrong.append(words)


class Load:
    """Makes requests at random and follows each to its end, as its client.

    Args:
        engine: Where they go.
        books: What becomes of them.
        vocab_size: Token ids of prompts.
        eos_token_ids: Of the model; empty for the fake one.
        known_answers: Whether the model is the fake one, whose answers are checked.
        seed: Of the load.
    """

    def __init__(
        self,
        engine: CountingEngine,
        books: Books,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        known_answers: bool,
        seed: int,
    ) -> None:
        self.engine = engine
        self.books = books
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._known_answers = known_answers
        self._random = random.Random(seed)
        self._beginnings = [self._tokens(PROMPT_TOKENS) for _ in range(8)]
        self._number = 0

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(self._vocab_size) for _ in range(count))

    def requests(self) -> Iterator[Request]:
        """One prompt's requests: one, or some siblings."""
        draw = self._random
        shared = draw.choice(self._beginnings)[: draw.randrange(PROMPT_TOKENS)]
        prompt = shared + self._tokens(draw.randint(1, PROMPT_TOKENS))
        self._number += 1
        request = Request(
            request_id=f"r{self._number}",
            prompt_token_ids=prompt,
            sampling_params=self._sampling_params(),
            eos_token_ids=self._eos_token_ids,
            priority=draw.choice((0, 0, 0, 10, 10, -5)),
            timeout_s=draw.uniform(0.05, 3.0) if draw.random() < 0.1 else None,
            cache_salt=draw.choice(("red", "blue")) if draw.random() < 0.1 else None,
            retention_priority=draw.choice((35, 35, 80)),
        )
        if draw.random() < 0.05:
            yield self._spoilt(request)
            return
        for i in range(draw.randint(2, 4) if draw.random() < 0.1 else 1):
            yield replace(request, request_id=f"{request.request_id}-{i}", sequence_index=i)

    def _sampling_params(self) -> SamplingParams:
        draw = self._random
        settings: dict[str, Any] = {"max_tokens": draw.randint(1, MAX_TOKENS), "seed": 0}
        if draw.random() < 0.3:
            settings |= {"temperature": 1.0, "top_p": 0.9, "seed": draw.randrange(2**32)}
        feature = draw.random()
        if feature < 0.08:
            settings["guided_decoding"] = draw.choice(GUIDES)
        elif feature < 0.16:
            settings["logprobs"] = draw.randint(0, 5)
        elif feature < 0.20:
            settings["prompt_logprobs"] = draw.randint(0, 2)
        elif feature < 0.24:
            settings["min_tokens"] = 1
        return SamplingParams(**settings)

    def _spoilt(self, request: Request) -> Request:
        return self._random.choice(
            (
                replace(request, prompt_token_ids=()),
                replace(request, prompt_token_ids=(0, self._vocab_size + 7)),
                replace(request, prompt_token_ids=request.prompt_token_ids * 200),
                replace(request, prompt_token_ids=("a",)),  # type: ignore[arg-type]
                replace(request, eos_token_ids=(2**70,)),
            )
        )

    async def follow(self, request: Request) -> None:
        """Send a request and see it to its end, or leave before."""
        outcome = await self._outcome(request)
        self.books.outcomes[outcome] += 1

    async def _outcome(self, request: Request) -> str:
        try:
            stream = self.engine.submit(request)
        except LlmserveError as error:
            return f"refused: {type(error).__name__}"
        whim = self._random.random()
        try:
            if whim < 0.05:
                await asyncio.sleep(self._random.uniform(0, 0.3))
                await stream.aclose()
                return "left"
            if whim < 0.10:
                wait_s = self._random.uniform(0, 0.3)
                return await asyncio.wait_for(self._read(stream, request), wait_s)
            if whim < 0.15:
                asyncio.get_running_loop().call_later(
                    self._random.uniform(0, 0.3), self._abort_soon, request.request_id
                )
            return await self._read(stream, request)
        except TimeoutError:
            return "cancelled"
        except InvalidRequestError as error:
            return f"refused by the process: {error}"
        except LlmserveError as error:
            return f"failed: {type(error).__name__}"

    def _abort_soon(self, request_id: str) -> None:
        task = asyncio.ensure_future(self.engine.abort(request_id))
        task.add_done_callback(lambda done: done.result())

    async def _read(self, stream: OutputStream, request: Request) -> str:
        token_ids: list[int] = []
        ends = []
        async for output in stream:
            if ends:
                self.books.complain(f"{request.request_id} goes on after its end")
            token_ids += output.token_ids
            if output.finish_reason is not None:
                ends.append(output.finish_reason)
                if output.finish_reason is FinishReason.ERROR:
                    self.books.complain(f"{request.request_id} failed: {output.error}")
        self._check(request, token_ids, ends[0])
        return str(ends[0].value)

    def _check(self, request: Request, token_ids: list[int], reason: FinishReason) -> None:
        params = request.sampling_params
        if reason is FinishReason.LENGTH and len(token_ids) != params.max_tokens:
            self.books.complain(f"{request.request_id} ended early, by its length")
        if self._known_answers and params.guided_decoding is None:
            expected = expected_tokens(
                request.prompt_token_ids, len(token_ids), vocab_size=self._vocab_size
            )
            if token_ids != expected:
                self.books.complain(f"{request.request_id} has a wrong answer")


@dataclass
class Memory:
    """What the processes hold, over time.

    Attributes:
        own: Bytes of this process.
        engine: Bytes of the engine's process, by its id.
    """

    own: list[int] = field(default_factory=list)
    engine: dict[int, list[int]] = field(default_factory=dict)

    def sample(self, engine_pid: int) -> None:
        """Look at both."""
        self.own.append(_anonymous_bytes(os.getpid()))
        with contextlib.suppress(OSError):
            self.engine.setdefault(engine_pid, []).append(_anonymous_bytes(engine_pid))

    def complaints(self) -> Iterator[str]:
        """Who has grown."""
        lives = [("this process", self.own)]
        lives += [(f"engine process {pid}", samples) for pid, samples in self.engine.items()]
        for name, samples in lives:
            if len(samples) < WARM_UP_SAMPLES:
                continue
            before, after = _quarters(samples)
            if after - before > max(MAX_GROWTH * before, MAX_GROWTH_BYTES):
                yield f"{name} grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB"


def _quarters(samples: list[int]) -> tuple[float, float]:
    """Medians of the second quarter and of the last."""
    quarter = len(samples) // 4
    return statistics.median(samples[quarter : 2 * quarter]), statistics.median(samples[-quarter:])


def _anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)  # it has ended, and is not yet collected


async def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Run it all; the report."""
    engine, settings = _engine(args)
    books, memory = Books(), Memory()
    await engine.start()
    try:
        load = Load(engine, books, seed=args.seed, **settings)
        capacity = await measure_capacity(load, args.calibration_s)
        books.outcomes.clear()
        kills = await overload(load, memory, OVERLOAD * capacity, args)
        await _check_rest(load, kills)
    finally:
        await engine.shutdown()
    for complaint in memory.complaints():
        books.complain(complaint)
    return _report(engine, books, memory, capacity, kills)


async def measure_capacity(load: Load, seconds: float) -> float:
    """Requests per second that the engine serves if there are always some waiting."""
    end_s = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < end_s:
            for request in load.requests():
                await load.follow(request)

    begun_s = time.monotonic()
    clients = load.engine.info.max_batch_size + MAX_QUEUE_SIZE // 2
    await asyncio.gather(*(client() for _ in range(clients)))
    refused = sum(n for name, n in load.books.outcomes.items() if name.startswith("refused"))
    return (load.books.outcomes.total() - refused) / (time.monotonic() - begun_s)


async def overload(load: Load, memory: Memory, rate: float, args: argparse.Namespace) -> int:
    """Send so many requests per second, kill the engine now and then; the number of kills."""
    begun_s = time.monotonic()
    end_s = begun_s + 60 * args.minutes
    next_s, next_sample_s, next_line_s = begun_s, begun_s, begun_s
    next_kill_s = begun_s + args.kill_every_s
    kills, tasks = 0, set[asyncio.Task[None]]()
    while (now_s := time.monotonic()) < end_s:
        if now_s >= next_sample_s:
            memory.sample(load.engine.info.pid)
            next_sample_s = now_s + SAMPLE_S
        if now_s >= next_line_s:
            print(f"{now_s - begun_s:6.0f} s: {await _line(load)}, {kills} kills", flush=True)
            next_line_s = now_s + args.line_every_s
        if now_s >= next_kill_s and end_s - now_s > args.kill_every_s / 2:
            if (await load.engine.health()).ok:
                os.kill(load.engine.info.pid, signal.SIGKILL)
                kills += 1
            next_kill_s = now_s + args.kill_every_s
        while next_s <= now_s:
            for request in load.requests():
                task = asyncio.create_task(load.follow(request))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                next_s += load._random.expovariate(rate)
        await asyncio.sleep(min(0.01, max(0.0, next_s - time.monotonic())))
    if tasks:
        done, still_open = await asyncio.wait(tasks, timeout=120)
        for task in still_open:
            task.cancel()
            load.books.complain("a request never ended")
        for task in done:
            task.result()
    return kills


async def _line(load: Load) -> str:
    stats = await load.engine.stats()
    return (
        f"{load.books.outcomes.total()} ended, {len(load.engine.open_ids)} open, "
        f"{stats.num_running_requests} running on {stats.used_num_blocks} blocks, "
        f"{_anonymous_bytes(os.getpid()) / 2**20:.0f} MiB here"
    )


async def _check_rest(load: Load, kills: int) -> None:
    """After the last request: nothing is held, nothing was lost, and the engine serves."""
    engine, books = load.engine, load.books
    for _ in range(200):
        if not engine.open_ids and (await engine.health()).ok:
            break
        await asyncio.sleep(0.1)
    if engine.open_ids:
        books.complain(f"{len(engine.open_ids)} requests have no end")
    if engine.doubled or engine.num_ended != engine.num_taken:
        books.complain(
            f"{engine.num_taken} requests were taken and {engine.num_ended} ended; "
            f"too often {engine.doubled[:5]}"
        )
    pid = engine.info.pid
    await asyncio.sleep(2.5)  # at rest the engine checks its books, and fails if they are wrong
    params = SamplingParams(max_tokens=3, seed=0)
    last = Request(request_id="last", prompt_token_ids=(1, 2, 3), sampling_params=params)
    with contextlib.suppress(EngineDeadError):
        token_ids = [token async for output in engine.submit(last) for token in output.token_ids]
        if len(token_ids) != 3:
            books.complain("the engine does not answer any more")
    stats = await engine.stats()
    held = stats.used_num_blocks, stats.num_running_requests, stats.num_queued_requests
    if held != (0, 0, 0):
        books.complain(f"blocks, running and queued requests are {held} at rest")
    if engine.info.pid != pid or not (await engine.health()).ok:
        books.complain("the engine died at rest")
    if engine.num_deaths != kills:
        books.complain(f"the engine died {engine.num_deaths} times and was killed {kills} times")


def _engine(args: argparse.Namespace) -> tuple[CountingEngine, dict[str, Any]]:
    """The engine, and what the load has to know of it."""
    config = EngineConfig(
        max_batch_size=16,
        max_num_tokens=256,
        max_seq_len=256,
        max_queue_size=MAX_QUEUE_SIZE,
        kv_cache=KvCacheConfig(max_tokens=2048, tokens_per_block=16),
        capacity_scheduler_policy=args.policy,
    )
    if args.engine is not None:
        spec = TorchRunnerSpec(str(args.engine))
        generation = json.loads((args.engine / "generation_config.json").read_text())
        eos = generation["eos_token_id"]
        vocab_size = json.loads((args.engine / "config.json").read_text())["pretrained_config"][
            "vocab_size"
        ]
        engine = CountingEngine(args.engine, config, runner=spec)
        return engine, {
            "vocab_size": vocab_size,
            "eos_token_ids": tuple([eos] if isinstance(eos, int) else eos),
            "known_answers": False,
        }
    fake = FakeRunnerSpec(
        build=BuildConfig(max_seq_len=256),
        vocab_size=1024,
        step_s=args.step_ms / 1000,
        tokenizer_file=str(TOKENIZER),
    )
    engine = CountingEngine(Path("unused"), config, runner=fake)
    return engine, {"vocab_size": fake.vocab_size, "eos_token_ids": (), "known_answers": True}


def _report(
    engine: CountingEngine, books: Books, memory: Memory, capacity: float, kills: int
) -> dict[str, Any]:
    """What was seen, for people and as plain data."""
    print(f"capacity {capacity:.1f} requests/s, offered {OVERLOAD * capacity:.1f}; {kills} kills")
    for outcome, count in sorted(books.outcomes.items()):
        print(f"{count:8} {outcome}")
    lives = {"this process": memory.own}
    lives |= {f"engine process {pid}": samples for pid, samples in memory.engine.items()}
    held_mib = {}
    for name, samples in lives.items():
        if len(samples) >= WARM_UP_SAMPLES:
            held_mib[name] = [round(held / 2**20, 1) for held in _quarters(samples)]
            print(
                f"{name}: {held_mib[name][0]} MiB in its second quarter, {held_mib[name][1]} last"
            )
    print("wrong: " + ("; ".join(books.wrong) or "nothing"))
    return {
        "capacity_per_s": round(capacity, 2),
        "kills": kills,
        "deaths": engine.num_deaths,
        "requests": books.outcomes.total(),
        "taken": engine.num_taken,
        "terminal_events": engine.num_ended,
        "outcomes": dict(sorted(books.outcomes.items())),
        "held_mib": held_mib,
        "wrong": books.wrong,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", type=Path, help="an engine directory; else a fake model")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--kill-every-s", type=float, default=180.0)
    parser.add_argument("--calibration-s", type=float, default=10.0)
    parser.add_argument("--line-every-s", type=float, default=30.0)
    parser.add_argument("--step-ms", type=float, default=5.0, help="of the fake model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--policy",
        choices=("guaranteed_no_evict", "max_utilization"),
        default="max_utilization",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
