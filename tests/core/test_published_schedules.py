"""TensorRT-LLM's published scheduler cases, with its own iteration counts.

They are the cases of its capacitySchedulerTest and microBatchSchedulerTest that are about rules of
ours: blocks of 10 tokens, and a schedule as a list of (iterations, who ran in them). Its tests of
LoRA pages, encoders, disaggregated serving, beams, static batches and the equal-progress and
forced chunking policies have no counterpart here.

Its capacity tests set each request's chunk by hand. Here chunks come from the token budget, first
come first served, so a chunk of c becomes a budget that gives such chunks. Where the two differ in
who runs when, the case says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import pytest

from llmserve.core.request import Request
from llmserve.runtime.fake import expected_tokens
from tests.core.factories import (
    Loop,
    StandInSpeculator,
    create_loop,
    create_request,
    scheduled_tokens,
)

POLICIES = ["guaranteed_no_evict", "max_utilization"]
BOTH = pytest.mark.parametrize("policy", POLICIES)


def create(pool_tokens: int, policy: str, *, max_num_tokens: int = 1000, **settings) -> Loop:
    return create_loop(
        num_blocks=pool_tokens // 10,
        tokens_per_block=10,
        policy=policy,
        max_num_tokens=max_num_tokens,
        **{"max_batch_size": 4, "enable_block_reuse": False, **settings},
    )


def requests(count: int, prompt_tokens: int, max_tokens: int, *, first: int = 0, priorities=None):
    """Requests "0", "1", ... of nothing but ones, as in TensorRT-LLM's tests."""
    return [
        create_request(str(i), [1] * prompt_tokens, max_tokens, priority=priority)
        for i, priority in enumerate(priorities or [0] * count, first)
    ]


def schedule(
    loop: Loop, initial: Sequence[Request], later: Sequence[Request] = (), at: int = -1
) -> list[tuple[int, str]]:
    """Run to the end; return who ran for how many iterations, and check every answer."""
    loop.add(*initial)
    iterations = []
    while loop.scheduler.has_unfinished_requests():
        if len(iterations) == at:
            loop.add(*later)
        iterations.append("".join(sorted(scheduled_tokens(loop.step()))))
    for request in (*initial, *later):
        max_tokens = request.sampling_params.max_tokens
        answer = expected_tokens(request.prompt_token_ids, max_tokens)
        assert loop.tokens[request.request_id] == answer
    return [(len(list(group)), who) for who, group in groupby(iterations)]


def total(spans: list[tuple[int, str]]) -> int:
    return sum(count for count, _ in spans)


# --- capacity -----------------------------------------------------------------------------------


@BOTH
def test_two_requests_fit_in_200_tokens_to_their_end(policy):
    assert schedule(create(200, policy), requests(2, 10, 80)) == [(80, "01")]


def test_max_utilization_pauses_the_second_of_two_at_iteration_41():
    spans = schedule(create(100, "max_utilization"), requests(2, 10, 80))
    assert spans == [(41, "01"), (39, "0"), (39, "1")]
    assert total(spans) == 119


def test_guaranteed_no_evict_runs_one_after_the_other_in_100_tokens():
    spans = schedule(create(100, "guaranteed_no_evict"), requests(2, 10, 80))
    assert spans == [(80, "0"), (80, "1")]


def test_max_utilization_pauses_the_lower_priority_not_the_later_arrival():
    # There 0.6 comes before 0.5, here -10 before 0.
    spans = schedule(create(100, "max_utilization"), requests(2, 10, 80, priorities=[0, -10]))
    assert spans == [(41, "01"), (39, "1"), (39, "0")]


def test_max_utilization_with_two_more_at_iteration_10():
    initial, later = requests(2, 10, 80), requests(2, 10, 80, first=2)
    spans = schedule(create(100, "max_utilization"), initial, later, at=10)
    assert spans == [
        (10, "01"),
        (11, "0123"),
        (20, "01"),
        (39, "0"),
        (10, "12"),
        (29, "1"),
        (20, "23"),
        (39, "2"),
        (49, "3"),
    ]
    assert total(spans) == 227


def test_max_utilization_with_two_more_of_higher_priority_at_iteration_10():
    initial = requests(2, 10, 80)
    later = requests(2, 10, 80, first=2, priorities=[-10, -20])
    spans = schedule(create(100, "max_utilization"), initial, later, at=10)
    assert spans == [
        (10, "01"),
        (11, "0123"),
        (10, "023"),
        (20, "23"),
        (39, "3"),
        (39, "2"),
        (10, "01"),
        (39, "0"),
        (49, "1"),
    ]
    assert total(spans) == 227


def test_max_utilization_pauses_for_higher_priorities_when_the_batch_is_full():
    initial = requests(2, 10, 10)
    later = requests(2, 10, 10, first=2, priorities=[-10, -20])
    loop = create(100, "max_utilization", max_batch_size=2)
    spans = schedule(loop, initial, later, at=2)
    assert spans == [(2, "01"), (10, "23"), (8, "01")]


def test_guaranteed_no_evict_with_two_more_at_iteration_10():
    initial, later = requests(2, 10, 80), requests(2, 10, 80, first=2)
    spans = schedule(create(100, "guaranteed_no_evict"), initial, later, at=10)
    assert spans == [(80, "0"), (80, "1"), (80, "2"), (80, "3")]


def test_requests_start_by_priority_then_arrival():
    loop = create(1000, "max_utilization", max_batch_size=12)
    priorities = [0, 0, -10, -10, -10, -50, 20, 20, 20, -10, -50, 0]
    loop.add(*requests(12, 10, 20, priorities=priorities))
    order = [int(new.request_id) for new in loop.step().new_requests]
    assert order == [5, 10, 2, 3, 4, 9, 0, 1, 11, 6, 7, 8]


def test_guesses_that_find_no_block_are_left_out():
    # There a request takes room for its guesses (5 and 10 here, all wrong) like for tokens, so the
    # second is paused at iteration 31 already, and the last of 129 ends it. Here guesses take only
    # what is left over: the schedule is the one without them.
    speculator = StandInSpeculator(
        lambda request_id, token_ids: [
            (expected_tokens(token_ids, 1)[0] + 1) % 256,
            *[0] * (4 if request_id == "0" else 9),
        ]
    )
    loop = create(100, "max_utilization", speculator=speculator)
    spans = schedule(loop, requests(2, 10, 80))
    assert spans == [(41, "01"), (39, "0"), (39, "1")]
    assert loop.scheduler.snapshot().num_draft_tokens > 0


# --- capacity with chunks -----------------------------------------------------------------------


@BOTH
def test_chunks_of_20_in_200_tokens(policy):
    # There both take 20 in each of the first two iterations. Here the first takes all that is left,
    # 40, and the second follows: the first token of the last one comes at the same iteration.
    loop = create(200, policy, max_num_tokens=40, chunk_unit_tokens=20)
    spans = schedule(loop, requests(2, 50, 40))
    assert spans == [(1, "0"), (40, "01"), (1, "1")]
    assert total(spans) == 42


def test_max_utilization_with_chunks_of_20_in_100_tokens():
    # There both take two iterations for their prompts, and what was computed before a pause is
    # computed again in one: so here the budget is 55 with units of 20.
    loop = create(100, "max_utilization", max_num_tokens=55, chunk_unit_tokens=20)
    spans = schedule(loop, requests(2, 30, 60))
    assert spans == [(21, "01"), (39, "0"), (40, "1")]
    assert total(spans) == 100


def test_max_utilization_starts_nobody_whose_whole_prompt_does_not_fit():
    # A chunk of 40 would fit beside the other's 70 + 20; the whole prompt does not.
    loop = create(100, "max_utilization", max_num_tokens=40, chunk_unit_tokens=20)
    spans = schedule(loop, requests(2, 70, 20))
    assert spans == [(21, "0"), (21, "1")]
    assert total(spans) == 42


def test_guaranteed_no_evict_with_chunks_of_20():
    loop = create(100, "guaranteed_no_evict", max_num_tokens=20, chunk_unit_tokens=20)
    assert schedule(loop, requests(2, 30, 60)) == [(61, "0"), (61, "1")]


def test_guaranteed_no_evict_with_chunks_of_20_and_two_more_at_iteration_10():
    loop = create(100, "guaranteed_no_evict", max_num_tokens=20, chunk_unit_tokens=20)
    initial, later = requests(2, 30, 60), requests(2, 30, 60, first=2)
    spans = schedule(loop, initial, later, at=10)
    assert spans == [(61, "0"), (61, "1"), (61, "2"), (61, "3")]
    assert total(spans) == 244


# --- reuse --------------------------------------------------------------------------------------
# Its tests count full blocks: partial reuse is off.


def reusing(pool_tokens: int, policy: str, **settings) -> Loop:
    return create(
        pool_tokens, policy, enable_block_reuse=True, enable_partial_reuse=False, **settings
    )


@BOTH
def test_duplicates_wait_for_the_first(policy):
    loop = reusing(200, policy, max_batch_size=3)
    spans = schedule(loop, [create_request(i, range(21), 2) for i in "012"])
    assert spans == [(1, "0"), (1, "012"), (1, "12")]
    assert loop.scheduler.snapshot().reused_blocks == 4


@BOTH
def test_a_duplicate_waits_for_all_chunks_of_the_first(policy):
    loop = reusing(200, policy, max_num_tokens=20, chunk_unit_tokens=20)
    spans = schedule(loop, [create_request(i, range(50), 40) for i in "01"])
    assert spans == [(3, "0"), (39, "01"), (1, "1")]
    assert total(spans) == 43
    assert loop.scheduler.snapshot().reused_blocks == 4


@BOTH
def test_only_those_wait_whose_prefix_is_being_computed(policy):
    loop = reusing(1000, policy, max_batch_size=5)
    prompts = [range(1, 12), range(2, 23), range(11), range(21), range(31)]
    spans = schedule(loop, [create_request(str(i), p, 80) for i, p in enumerate(prompts)])
    assert spans == [(1, "012"), (1, "0123"), (78, "01234"), (1, "34"), (1, "4")]
    assert total(spans) == 82
    assert loop.scheduler.snapshot().reused_blocks == 3


@BOTH
@pytest.mark.parametrize(
    ("pool_tokens", "prompts", "reused_blocks"),
    [
        (100, [range(20), range(20)], 1),
        (60, [range(30), range(30)], 2),
        (50, [range(20), range(20)], 1),  # fits because of the reuse alone
        (150, [range(20), range(20)], 1),
        (200, [range(30), [*range(20), *[999] * 10]], 2),
    ],
)
def test_the_second_starts_an_iteration_later_and_reuses(
    policy, pool_tokens, prompts, reused_blocks
):
    loop = reusing(pool_tokens, policy)
    spans = schedule(loop, [create_request(str(i), p, 5) for i, p in enumerate(prompts)])
    assert spans == [(1, "0"), (4, "01"), (1, "1")]
    assert loop.scheduler.snapshot().reused_blocks == reused_blocks


@BOTH
@pytest.mark.parametrize(
    ("reuse", "prompts"), [(True, [[100] * 20, [200] * 20]), (False, [range(20), range(20)])]
)
def test_nobody_waits_where_there_is_nothing_to_reuse(policy, reuse, prompts):
    loop = create(200, policy, enable_block_reuse=reuse)
    spans = schedule(loop, [create_request(str(i), p, 5) for i, p in enumerate(prompts)])
    assert spans == [(5, "01")]
    assert loop.scheduler.snapshot().reused_blocks == 0


# --- the token budget ---------------------------------------------------------------------------


@BOTH
def test_a_batch_of_two_takes_four_requests_in_pairs(policy):
    loop = create(1000, policy, max_batch_size=2)
    assert schedule(loop, requests(4, 10, 80)) == [(80, "01"), (80, "23")]


@BOTH
def test_one_prompt_of_10_beside_two_decodes_in_12_tokens(policy):
    loop = create(1000, policy, max_num_tokens=12, enable_chunked_prefill=False)
    spans = schedule(loop, requests(4, 10, 10))
    assert spans == [(1, "0"), (1, "01"), (8, "012"), (1, "123"), (1, "23"), (8, "3")]
    assert total(spans) == 20


@pytest.mark.parametrize(
    ("lengths", "unit", "budget", "positions"),
    [
        ((25, 25), 20, 1000, [(25, 25)]),
        ((25, 25), 30, 1000, [(25, 25)]),
        ((25, 25), 20, 20, [(20, 0), (25, 0), (25, 20), (25, 25)]),
        ((25, 25), 5, 30, [(25, 5), (25, 25)]),
        ((25, 15), 5, 30, [(25, 5), (25, 15)]),
        ((25, 25), 5, 15, [(15, 0), (25, 5), (25, 20), (25, 25)]),
        # There a budget below one unit computes nothing for ever; here it is the unit.
        ((25, 25), 20, 10, [(10, 0), (20, 0), (25, 0), (25, 10), (25, 20), (25, 25)]),
    ],
)
def test_first_come_first_served_chunks(lengths, unit, budget, positions):
    loop = create(1000, "max_utilization", max_num_tokens=budget, chunk_unit_tokens=unit)
    loop.add(*(create_request(str(i), [1] * n, 1) for i, n in enumerate(lengths)))
    computed = [0, 0]
    for expected in positions:
        for request_id, num_tokens in scheduled_tokens(loop.step()).items():
            computed[int(request_id)] += num_tokens
        assert tuple(computed) == expected
    assert not loop.scheduler.has_unfinished_requests()


def warmed(prefix_tokens: int, tokens_per_block: int, **settings) -> Loop:
    """A loop with the tokens 0, 1, ... in its cache."""
    loop = create_loop(
        tokens_per_block=tokens_per_block,
        max_batch_size=4,
        policy="max_utilization",
        enable_partial_reuse=False,
        **settings,
    )
    loop.add(create_request("first", [*range(prefix_tokens), 77], 1))
    loop.run()
    return loop


def test_reused_tokens_cost_no_budget():
    loop = warmed(15, 5, max_num_tokens=20, enable_chunked_prefill=False)
    loop.add(*(create_request(i, [*range(15), *[ord(i)] * 5], 5) for i in "ab"))
    assert scheduled_tokens(loop.step()) == {"a": 5, "b": 5}


@pytest.mark.parametrize(("cached", "computed"), [(0, 15), (10, 10)])
def test_a_prompt_is_chunked_by_what_is_not_reused(cached, computed):
    loop = warmed(cached, 5, max_num_tokens=15, chunk_unit_tokens=5)
    loop.add(create_request("a", range(20), 5))
    assert scheduled_tokens(loop.step()) == {"a": computed}


def test_a_small_budget_goes_to_what_is_not_reused():
    loop = warmed(15, 5, max_num_tokens=7, chunk_unit_tokens=1)
    loop.add(*(create_request(i, [*range(15), *[ord(i)] * 5], 5) for i in "abc"))
    assert scheduled_tokens(loop.step()) == {"a": 5, "b": 2}


def test_a_prompt_that_is_all_there_costs_a_token():
    loop = warmed(9, 3, max_num_tokens=10, enable_chunked_prefill=False)
    loop.add(create_request("a", range(10), 5), create_request("b", [88] * 10, 5))
    assert scheduled_tokens(loop.step()) == {"a": 1}
