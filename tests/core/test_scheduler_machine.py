"""Random histories: whatever is added, aborted and stepped, answers are right and all end."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmserve.core.request import FinishReason
from llmserve.errors import ContextLengthError
from llmserve.runtime.fake import expected_tokens
from tests.core.factories import create_loop, create_request, scheduled_tokens

VOCAB_SIZE = 3  # so few that prompts and answers often share blocks
EOS = 2
MAX_SEQ_LEN = 36


@dataclass
class Asked:
    prompt: list[int]
    max_tokens: int
    stops_at_eos: bool

    def answer(self) -> list[int]:
        tokens = expected_tokens(self.prompt, self.max_tokens, vocab_size=VOCAB_SIZE)
        if self.stops_at_eos and EOS in tokens:
            return tokens[: tokens.index(EOS) + 1]
        return tokens


# Prompts are cut from two texts, and some go their own way at the end, so that many share blocks.
TEXTS = [expected_tokens([seed], MAX_SEQ_LEN, vocab_size=VOCAB_SIZE) for seed in (0, 1)]
prompts = st.builds(
    lambda text, length, tail: text[:length] + tail,
    st.sampled_from(TEXTS),
    st.integers(1, 20),
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3),
)
asked = st.builds(
    Asked, prompts, st.integers(1, 20), stops_at_eos=st.sampled_from([False, False, True])
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(["guaranteed_no_evict", "max_utilization"]),
        pool_tokens=st.lists(st.integers(12, 80), min_size=1, max_size=2),
        tokens_per_block=st.integers(1, 5),
        max_batch_size=st.integers(1, 6),
        max_num_tokens=st.integers(1, 40),
        reuse=st.booleans(),
        chunked=st.booleans(),
    )
    def start(
        self, policy, pool_tokens, tokens_per_block, max_batch_size, max_num_tokens, reuse, chunked
    ):
        self.guaranteed = policy == "guaranteed_no_evict"
        self.failing: dict[str, str] = {}
        self.loop = create_loop(
            num_blocks=tuple(max(1, tokens // tokens_per_block) for tokens in pool_tokens),
            tokens_per_block=tokens_per_block,
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
            max_seq_len=MAX_SEQ_LEN,
            policy=policy,
            enable_block_reuse=reuse,
            enable_chunked_prefill=chunked,
            max_queue_size=10**6,
            vocab_size=VOCAB_SIZE,
        )
        self.loop.runner.errors = self.failing
        self.asked: dict[str, Asked] = {}
        self.count = 0

    def add(self, what: Asked, salted: bool, request_id: str | None = None) -> None:
        if request_id is None:
            request_id = f"r{self.count}"
            self.count += 1
        eos = (EOS,) if what.stops_at_eos else ()
        salt = "salt" if salted else None
        request = create_request(
            request_id, what.prompt, what.max_tokens, eos_token_ids=eos, cache_salt=salt
        )
        try:
            self.loop.add(request)
        except ContextLengthError:
            return
        self.asked[request_id] = what

    def open_ids(self) -> list[str]:
        return [i for i in self.asked if i not in self.loop.ended]

    @rule(burst=st.lists(st.tuples(asked, st.sampled_from([False, False, True])), min_size=1))
    def add_requests(self, burst):
        for what, salted in burst:
            self.add(what, salted)

    @rule(data=st.data(), what=asked, fails=st.booleans())
    def add_next_turn(self, data, what, fails):
        # The next turn of a conversation: prompt and answer of an earlier one, and more.
        if self.asked:
            request_id = data.draw(st.sampled_from(sorted(self.asked)))
            history = self.asked[request_id].prompt + self.loop.tokens[request_id]
            what = Asked(history + what.prompt[:3], what.max_tokens, what.stops_at_eos)
        self.add(what, False)
        if fails:
            self.failing[f"r{self.count - 1}"] = "as asked"

    @precondition(lambda self: self.open_ids())
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(self.open_ids()))
        assert self.loop.abort(request_id) is not None
        assert self.loop.abort(request_id) is None

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.loop.step()

    @precondition(lambda self: self.open_ids())
    @rule(data=st.data(), what=asked, again=st.booleans())
    def step_with_aborts_under_way(self, data, what, again):
        victims = data.draw(st.lists(st.sampled_from(self.open_ids()), max_size=3, unique=True))

        def mid_step():
            usage = self.loop.kv.usage()
            for request_id in victims:
                assert self.loop.abort(request_id) is not None
            # Every running request is part of the step, which may still write its blocks.
            assert self.loop.kv.usage() == usage
            if again and victims:  # the same id at once
                del self.loop.ended[victims[0]], self.asked[victims[0]]
                self.add(what, False, victims[0])

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
        # In every step the first started computes a token that is never lost to a pause while it
        # is the first, or a decode that took its budget gains a token.
        open_requests = [self.asked[i] for i in self.open_ids()]
        self.loop.run(sum(len(what.prompt) + 2 * what.max_tokens for what in open_requests))
        for request_id, what in self.asked.items():
            reason, tokens = self.loop.ended[request_id].finish_reason, self.loop.tokens[request_id]
            if reason is FinishReason.ABORT:
                continue
            if request_id in self.failing:
                assert (reason, tokens) == (FinishReason.ERROR, [])
                continue
            assert tokens == what.answer(), request_id
            stopped = what.stops_at_eos and tokens[-1] == EOS
            assert reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
        last = self.loop.step()  # flushes the ended ones
        assert scheduled_tokens(last) == {}
        assert not self.loop.runner.known_request_ids
        assert not self.loop.scheduler.has_finished_requests()
        usage = self.loop.kv.usage()
        assert usage.free == usage.total


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
    settings = settings(QUICK, max_examples=2000, stateful_step_count=50)
