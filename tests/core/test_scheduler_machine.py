"""Random histories: whatever is added, ended and stepped, answers are right and all come to an end.

The model to compare with is the fake runner's function of a request's prompt alone: no batch, no
cache, no steps. The fake runner itself checks that every block that is read holds what it should.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmserve.core.request import BATCH_PRIORITY, FinishReason
from llmserve.errors import ContextLengthError
from llmserve.runtime.fake import expected_prompt_logprobs, expected_tokens
from tests.core.factories import (
    Loop,
    StandInSpeculator,
    create_loop,
    create_request,
    scheduled_tokens,
)

VOCAB_SIZE = 3  # so few that prompts and answers often share blocks
EOS = 2
MAX_SEQ_LEN = 36


def allowed_tokens(answer: list[int]) -> list[int]:
    """What a constrained answer may go on with: all but one, another one each time."""
    return [token_id for token_id in range(VOCAB_SIZE) if token_id != len(answer) % VOCAB_SIZE]


def num_common_tokens(first: list[int], second: list[int]) -> int:
    differing = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, min(len(first), len(second)))


@dataclass
class LengthConstraint:
    """Ends an answer after so many tokens; each of them must be one of ``allowed_tokens``."""

    length: int
    answer: list[int] = field(default_factory=list)

    def accept(self, token_id: int) -> bool:
        assert token_id in allowed_tokens(self.answer), "drawn under the mask of another step"
        self.answer.append(token_id)
        return len(self.answer) == self.length

    def mask(self) -> npt.NDArray[np.int32]:
        return np.array([sum(1 << i for i in allowed_tokens(self.answer))], dtype=np.int32)


@dataclass
class Asked:
    prompt: list[int]
    max_tokens: int
    stops_at_eos: bool = False
    constrained_to: int | None = None
    cache_salt: str | None = None
    priority: int = 0
    timeout_s: float | None = None
    prompt_logprobs: int | None = None
    retention_priority: int = 35

    def answer(self) -> list[int]:
        constrained = self.constrained_to is not None
        tokens = expected_tokens(
            self.prompt,
            self.max_tokens,
            vocab_size=VOCAB_SIZE,
            allowed=allowed_tokens if constrained else None,
        )
        if self.stops_at_eos and EOS in tokens:
            tokens = tokens[: tokens.index(EOS) + 1]
        return tokens[: self.constrained_to]

    def finish_reason(self) -> FinishReason:
        tokens = self.answer()
        stopped = self.stops_at_eos and tokens[-1] == EOS
        complete = self.constrained_to is not None and len(tokens) == self.constrained_to
        return FinishReason.STOP if stopped or complete else FinishReason.LENGTH


@dataclass
class RandomGuesses:
    """Guesses that are right for some tokens and then, sometimes, wrong."""

    seed: int

    def __call__(self, request_id: str, token_ids: list[int]) -> list[int]:
        rng = random.Random(f"{self.seed} {request_id} {len(token_ids)}")
        guess = expected_tokens(token_ids, rng.randint(0, 5), vocab_size=VOCAB_SIZE)
        if guess and rng.random() < 0.5:
            guess[rng.randrange(len(guess))] = rng.randrange(VOCAB_SIZE)
        return guess


# Prompts are cut from two texts, and some go their own way at the end, so that many share blocks.
TEXTS = [expected_tokens([seed], MAX_SEQ_LEN, vocab_size=VOCAB_SIZE) for seed in (0, 1)]
prompts = st.builds(
    lambda text, length, tail: text[:length] + tail,
    st.sampled_from(TEXTS),
    st.integers(1, 20),
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3),
)
plain = st.builds(Asked, prompts, st.integers(1, 20))
special = st.builds(
    Asked,
    prompts,
    st.integers(1, 20),
    stops_at_eos=st.booleans(),
    constrained_to=st.none() | st.integers(1, 8),
    cache_salt=st.sampled_from([None, None, "salt"]),
    priority=st.sampled_from([0, 0, BATCH_PRIORITY, -5]),
    timeout_s=st.none() | st.integers(1, 20),
    prompt_logprobs=st.sampled_from([None, None, 0, 2]),
    retention_priority=st.sampled_from([35, 0, 100]),
)
asked = plain | special
windows = st.sampled_from([(None,), (None,), (None, None), (None, 3), (None, 6), (1,), (5,)])


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(["guaranteed_no_evict", "max_utilization"]),
        windows=windows,
        pool_tokens=st.lists(st.integers(1, 80), min_size=2, max_size=2),
        tokens_per_block=st.integers(1, 5),
        max_batch_size=st.integers(1, 6),
        spare_tokens=st.integers(0, 34),
        chunk_unit_tokens=st.none() | st.integers(1, 8),
        reuse=st.sampled_from(["none", "full", "partial", "partial"]),
        chunked=st.booleans(),
        runs_ahead=st.booleans(),
        guesses=st.none() | st.builds(RandomGuesses, st.integers(0, 99)),
    )
    def start(
        self,
        policy,
        windows,
        pool_tokens,
        tokens_per_block,
        max_batch_size,
        spare_tokens,
        chunk_unit_tokens,
        reuse,
        chunked,
        runs_ahead,
        guesses,
    ):
        self.guaranteed = policy == "guaranteed_no_evict"
        self.failing: dict[str, str] = {}
        pools = [max(1, tokens // tokens_per_block) for tokens in pool_tokens]
        self.loop = create_loop(
            num_blocks=tuple(pools[: len(windows)]),
            windows=windows,
            tokens_per_block=tokens_per_block,
            max_batch_size=max_batch_size,
            max_num_tokens=max_batch_size + spare_tokens,
            max_seq_len=MAX_SEQ_LEN,
            policy=policy,
            enable_block_reuse=reuse != "none",
            enable_partial_reuse=reuse == "partial",
            enable_chunked_prefill=chunked,
            chunk_unit_tokens=chunk_unit_tokens,
            max_queue_size=10**6,
            speculator=guesses and StandInSpeculator(guesses),
            runs_ahead=runs_ahead,
            vocab_size=VOCAB_SIZE,
        )
        self.loop.runner.errors = self.failing
        self.asked: dict[str, Asked] = {}
        self.texts: dict[str | None, list[list[list[int]]]] = {}  # by salt: prompts and answers
        self.new_ids = (f"r{i}" for i in count())

    def add(self, what: Asked, request_id: str | None = None) -> str | None:
        request_id = request_id or next(self.new_ids)
        request = create_request(
            request_id,
            what.prompt,
            what.max_tokens,
            eos_token_ids=(EOS,) if what.stops_at_eos else (),
            cache_salt=what.cache_salt,
            priority=what.priority,
            timeout_s=what.timeout_s,
            prompt_logprobs=what.prompt_logprobs,
            retention_priority=what.retention_priority,
        )
        length = what.constrained_to
        try:
            self.loop.add(request, constraint=length and LengthConstraint(length))
        except ContextLengthError:
            return None
        self.asked[request_id] = what
        text = [what.prompt, self.loop.tokens[request_id]]
        self.texts.setdefault(what.cache_salt, []).append(text)
        return request_id

    def open_ids(self) -> list[str]:
        return [i for i in self.asked if i not in self.loop.ended]

    @rule(burst=st.lists(asked, min_size=1))
    def add_requests(self, burst):
        for what in burst:
            self.add(what)

    @rule(what=asked, n=st.integers(2, 4))
    def add_siblings(self, what, n):
        for _ in range(n):
            self.add(what)

    @rule(data=st.data(), what=asked, fails=st.booleans())
    def add_next_turn(self, data, what, fails):
        # The next turn of a conversation: prompt and answer of an earlier one, and more.
        if self.asked:
            earlier = data.draw(st.sampled_from(sorted(self.asked)))
            what.prompt = self.asked[earlier].prompt + self.loop.tokens[earlier] + what.prompt[:3]
        request_id = self.add(what)
        if fails and request_id is not None:
            self.failing[request_id] = "as asked"

    @precondition(lambda self: self.open_ids())
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(self.open_ids()))
        assert self.loop.abort(request_id) is not None
        assert self.loop.abort(request_id) is None

    @rule(seconds=st.integers(0, 10))
    def expire(self, seconds):
        self.loop.now_s += seconds
        for output in self.loop.expire():
            assert self.asked[output.request_id].timeout_s is not None
        assert not self.loop.expire()

    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        for _ in range(steps):
            self.loop.step()

    @precondition(lambda self: self.open_ids())
    @rule(data=st.data(), what=asked, again=st.booleans())
    def step_with_aborts_under_way(self, data, what, again):
        victims = data.draw(st.lists(st.sampled_from(self.open_ids()), max_size=3, unique=True))

        def mid_step():
            for request_id in victims:
                # Running ahead, one of them may have ended by the step before this one.
                ended = request_id in self.loop.ended
                assert (self.loop.abort(request_id) is None) == ended
            if again and victims:  # the same id at once
                del self.loop.ended[victims[0]], self.asked[victims[0]]
                self.failing.pop(victims[0], None)
                self.add(what, victims[0])

        self.loop.step(mid_step)

    @invariant()
    def books_are_right(self):
        if not hasattr(self, "loop"):
            return
        self.loop.scheduler.check_integrity()
        stats = self.loop.scheduler.snapshot()
        assert stats.used_num_blocks + stats.free_num_blocks == stats.max_num_blocks
        assert stats.num_running_requests + stats.num_queued_requests == len(self.open_ids())
        if self.guaranteed:
            assert stats.num_preemptions == 0
        for request_id, what in self.asked.items():
            tokens = self.loop.tokens[request_id]
            assert tokens == what.answer()[: len(tokens)], request_id

    def teardown(self):
        if not hasattr(self, "loop"):
            return
        # In every step the first of the batch computes a token, unless the one it is to compute is
        # still being sampled. It is paused only for another one that then goes first.
        open_requests = [self.asked[i] for i in self.open_ids()]
        work = sum(len(what.prompt) + 2 * what.max_tokens for what in open_requests)
        self.loop.run((work + 1) * (1 + self.loop.runs_ahead))
        for request_id, what in self.asked.items():
            self.check_end(request_id, what)
        last = self.loop.step()  # flushes the ended ones
        self.loop.run()
        assert scheduled_tokens(last) == {}
        assert not self.loop.runner.known_request_ids
        assert not self.loop.scheduler.has_finished_requests()
        usage = self.loop.kv.usage()
        assert usage.free == usage.total

    def reusable_tokens(self, request_id: str, what: Asked) -> int:
        """The longest beginning of a prompt that another request under its salt has had."""
        if what.prompt_logprobs is not None:
            return 0
        others = [
            prompt + answer
            for prompt, answer in self.texts[what.cache_salt]
            if answer is not self.loop.tokens[request_id]
        ]
        return max((num_common_tokens(what.prompt[:-1], other) for other in others), default=0)

    def check_end(self, request_id: str, what: Asked) -> None:
        reason, tokens = self.loop.ended[request_id].finish_reason, self.loop.tokens[request_id]
        cached = self.loop.ended[request_id].num_cached_tokens
        assert cached <= self.reusable_tokens(request_id, what), request_id
        if tokens and what.prompt_logprobs is not None:
            given = self.loop.prompt_logprobs[request_id]
            assert list(given) == expected_prompt_logprobs(what.prompt, what.prompt_logprobs)
        if reason in (FinishReason.ABORT, FinishReason.TIMEOUT):
            return
        if request_id in self.failing:
            assert (reason, tokens) == (FinishReason.ERROR, [])
            return
        assert (reason, tokens) == (what.finish_reason(), what.answer()), request_id


QUICK = settings(
    max_examples=150,
    stateful_step_count=20,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = QUICK


@pytest.mark.full
class TestSchedulerMachineFull(SchedulerMachine.TestCase):
    settings = settings(QUICK, max_examples=3000, stateful_step_count=50)


# --- nobody waits for ever ----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["guaranteed_no_evict", "max_utilization"])
@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("num_blocks", [8, 64])
def test_batch_jobs_move_while_interactive_requests_never_end(policy, runs_ahead, num_blocks):
    loop: Loop = create_loop(
        num_blocks=num_blocks, max_batch_size=4, policy=policy, runs_ahead=runs_ahead
    )
    jobs = [f"job {i}" for i in range(3)]
    loop.add(*(create_request(job, [i] * 9, 12, priority=10) for i, job in enumerate(jobs, 50)))
    ended_at, new_ids = {}, count()
    for step in range(400):
        while loop.scheduler.snapshot().num_queued_requests < len(jobs) + 5:
            i = next(new_ids)
            loop.add(create_request(str(i), [i % 200] * 6, 6))
        loop.step()
        ended_at.update((job, step) for job in jobs if job in loop.ended and job not in ended_at)
    # Every eighth start is a job's: at most 7 times 6 steps until then, on a batch of at least 2.
    assert len(ended_at) == len(jobs)
    assert max(ended_at.values()) < 150, ended_at
    assert all(len(loop.tokens[job]) == 12 for job in jobs)
