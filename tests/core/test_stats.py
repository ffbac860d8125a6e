"""Every counter against a replay: what the steps and outputs of a run say, counted once more."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import asdict, dataclass, field

import pytest

from llmserve.core.request import Output
from llmserve.core.stats import EngineStats
from llmserve.core.step import ModelRunnerOutput, SchedulerOutput
from tests.core.factories import Loop, create_loop, create_request


@dataclass
class Replay:
    """Counts what it is shown; knows nothing of the scheduler's insides."""

    prompts: dict[str, int] = field(default_factory=dict)
    arrivals: dict[str, float] = field(default_factory=dict)
    started: set[str] = field(default_factory=set)
    stats: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    iterations: dict[int, dict[str, float]] = field(default_factory=dict)
    iteration: dict[str, float] = field(default_factory=dict)

    def scheduled(self, step: SchedulerOutput, now_s: float, open_ids: set[str]) -> None:
        """A step was put together at this time, while these requests had not ended."""
        new = [n.request_id for n in step.new_requests if n.request_id not in self.started]
        for request_id in new:
            start = next(p for p in step.prefills if p.request_id == request_id)
            self.stats["prompt_tokens"] += self.prompts[request_id]
            self.stats["prefix_cache_queries_tokens"] += self.prompts[request_id]
            self.stats["prefix_cache_hits_tokens"] += start.num_computed_tokens
        self.started.update(new)
        # One group: a new request's table begins with the blocks it shares, whole ones.
        for (table,) in step.new_block_ids.values():
            self.stats["alloc_total_blocks"] += len(table)
            self.stats["alloc_new_blocks"] += len(table)
        for new_request in step.new_requests:
            start = next(p for p in step.prefills if p.request_id == new_request.request_id)
            self.stats["alloc_new_blocks"] -= start.num_computed_tokens // 4
        # The runner is told to forget the ended ones and the paused ones.
        paused = [request_id for request_id in step.finished_request_ids if request_id in open_ids]
        self.stats["num_preemptions"] += len(paused)
        self.iterations[step.step_id] = {
            "iter_scheduled_requests": len(step.decodes) + len(step.prefills),
            "iter_context_requests": len(step.prefills),
            "iter_gen_requests": len(step.decodes),
            "iter_paused_requests": len(paused),
            "iter_context_tokens": sum(prefill.num_tokens for prefill in step.prefills),
            "iter_new_requests": len(new),
            "iter_queue_s": sum(now_s - self.arrivals[request_id] for request_id in new),
        }

    def came_back(
        self, step: SchedulerOutput, result: ModelRunnerOutput, outputs: list[Output]
    ) -> None:
        """A step, what the runner made of it, and what was made of that."""
        tokens = {output.request_id: len(output.token_ids) for output in outputs}
        for request_id, guess in step.draft_token_ids.items():
            if request_id not in tokens:
                continue  # it has ended meanwhile
            self.stats["num_drafts"] += 1
            self.stats["num_draft_tokens"] += len(guess)
            self.stats["num_accepted_draft_tokens"] += len(result.token_ids[request_id]) - 1
        self.stats["generation_tokens"] += sum(tokens.values())
        self.ended(outputs)
        if step.num_requests:
            self.stats["num_steps"] += 1
            decoded = sum(tokens.get(request_id, 0) for request_id in step.decodes)
            self.iteration = self.iterations[step.step_id] | {"iter_decoded_tokens": decoded}

    def ended(self, outputs: list[Output]) -> None:
        """Last outputs, from a step or from elsewhere."""
        for output in outputs:
            if output.finish_reason is not None:
                self.finished[output.finish_reason.value] += 1

    def check(self, stats: EngineStats) -> None:
        counted = asdict(stats)
        expected = {
            name: self.stats[name]
            for name in (
                *("prompt_tokens", "prefix_cache_queries_tokens", "prefix_cache_hits_tokens"),
                *("num_preemptions", "num_drafts", "num_draft_tokens"),
                *("num_accepted_draft_tokens", "generation_tokens", "num_steps"),
                *("alloc_total_blocks", "alloc_new_blocks"),
            )
        }
        assert {name: counted[name] for name in expected} == expected
        assert stats.finished == dict(self.finished)
        assert stats.num_completed_requests == sum(self.finished.values())
        if self.iteration:
            assert {name: counted[name] for name in self.iteration} == self.iteration


class Guesses:
    """Guesses at random: a token of three, so that many are right."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.guesses = rng, {}

    def extended(self, request_id, token_ids):
        self.forget(request_id)
        if self.rng.random() < 0.5:
            self.guesses[request_id] = [self.rng.randrange(3) for _ in range(3)]

    def forget(self, request_id):
        self.guesses.pop(request_id, None)


def execute(loop: Loop, replay: Replay, step: SchedulerOutput) -> None:
    result = loop.runner.finish(loop.runner.launch(step))
    outputs = loop.scheduler.update_from_output(step, result)
    loop.take(outputs)
    replay.came_back(step, result, outputs)
    replay.check(loop.scheduler.snapshot())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("speculates", [False, True])
def test_counters_equal_a_replay(seed, speculates):
    rng = random.Random(seed)
    loop = create_loop(
        num_blocks=12,
        policy=rng.choice(["guaranteed_no_evict", "max_utilization"]),
        max_batch_size=4,
        max_num_tokens=16,
        vocab_size=3,
        max_queue_size=1000,
        speculator=Guesses(rng) if speculates else None,
        errors={"r7": "as asked"},
    )
    replay, under_way, ahead = Replay(), [], seed % 2
    for count in range(60):
        for _ in range(rng.choice([0, 0, 1, 2])):
            request_id = f"r{len(replay.prompts)}"
            prompt = [rng.randrange(3) for _ in range(rng.randint(1, 12))]
            timeout_s = rng.choice([None, None, 20.0])
            loop.add(create_request(request_id, prompt, rng.randint(1, 12), timeout_s=timeout_s))
            replay.prompts[request_id], replay.arrivals[request_id] = len(prompt), loop.now_s
        loop.now_s += 1.0
        replay.ended(loop.expire())
        if count % 9 == 5 and (open_ids := set(loop.tokens) - set(loop.ended)):
            replay.ended([loop.abort(rng.choice(sorted(open_ids)))])
        if under_way and not loop.scheduler.may_run_ahead:
            execute(loop, replay, under_way.pop(0))
        open_ids = set(loop.tokens) - set(loop.ended)
        under_way.append(loop.scheduler.schedule(loop.now_s))
        replay.scheduled(under_way[-1], loop.now_s, open_ids)
        while len(under_way) > ahead:
            execute(loop, replay, under_way.pop(0))
    assert replay.stats["generation_tokens"] > 50
    assert len(replay.finished) >= 2
    assert bool(replay.stats["num_drafts"]) == speculates
    assert replay.stats["prefix_cache_hits_tokens"] > 0
