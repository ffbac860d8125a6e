"""Each rule of the scheduler on its own; random histories are in test_scheduler_machine."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve.core.request import FinishReason, TokenLogprobs
from llmserve.core.step import ModelRunnerOutput
from llmserve.errors import EngineError
from llmserve.runtime.fake import expected_tokens
from tests.core.factories import (
    create_loop,
    create_request,
    create_requests,
    create_scheduler,
    scheduled_tokens,
)

# --- token budget and chunks --------------------------------------------------------------------


def test_decodes_come_before_prefills_in_step_and_budget():
    loop = create_loop(max_num_tokens=8)
    loop.add(create_request("a", range(3)))
    loop.step()
    loop.add(create_request("b", range(50, 57)))
    step = loop.step()
    assert list(scheduled_tokens(step).items()) == [("a", 1), ("b", 7)]


def test_chunks_are_whole_blocks_until_the_last():
    loop = create_loop(max_num_tokens=10, tokens_per_block=4)
    loop.add(create_request("a", range(19), 1))
    assert [scheduled_tokens(step) for step in loop.run()] == [{"a": 8}, {"a": 8}, {"a": 3}]
    assert loop.tokens["a"] == expected_tokens(range(19), 1)


def test_prefills_share_what_is_left_first_come_first_served():
    loop = create_loop(max_num_tokens=14)
    loop.add(create_request("a", range(9), 1), create_request("b", range(50, 70), 1))
    # a whole; of the 5 left one block for b.
    assert scheduled_tokens(loop.step()) == {"a": 9, "b": 4}
    assert scheduled_tokens(loop.step()) == {"b": 12}


def test_a_prefill_that_gets_nothing_ends_the_round():
    loop = create_loop(max_num_tokens=11)
    loop.add(create_request("a", range(8), 1), create_request("b", range(50, 60), 1))
    loop.add(create_request("c", [99], 1))
    assert scheduled_tokens(loop.step()) == {"a": 8}  # 3 are left: no block for b, c must wait
    assert scheduled_tokens(loop.step()) == {"b": 10, "c": 1}


def test_a_budget_below_one_block_still_makes_progress():
    loop = create_loop(max_num_tokens=3, tokens_per_block=8)
    loop.add(create_request("a", range(10), 2))
    loop.run()
    assert loop.tokens["a"] == expected_tokens(range(10), 2)


def test_without_chunking_a_prompt_is_computed_in_one_step_or_waits():
    loop = create_loop(max_num_tokens=8, enable_chunked_prefill=False)
    loop.add(create_request("a", range(5), 3), create_request("b", range(50, 58), 1))
    assert [scheduled_tokens(s) for s in loop.run()] == [{"a": 5}, {"a": 1}, {"a": 1}, {"b": 8}]


def test_a_step_has_room_for_a_decode_of_every_request():
    with pytest.raises(ValueError, match="max_num_tokens 2 < max_batch_size 3"):
        create_scheduler(max_num_tokens=2, max_batch_size=3)


def test_chunk_units_are_a_setting():
    loop = create_loop(max_num_tokens=10, tokens_per_block=4, chunk_unit_tokens=5)
    loop.add(create_request("a", range(19), 1))
    assert [scheduled_tokens(step) for step in loop.run()] == [{"a": 10}, {"a": 9}]


def test_the_batch_never_holds_more_than_max_batch_size():
    loop = create_loop(max_batch_size=2)
    loop.add(*create_requests(5))
    assert max(step.num_requests for step in loop.run()) == 2
    assert len(loop.ended) == 5


# --- capacity -----------------------------------------------------------------------------------


def test_guaranteed_no_evict_reserves_what_running_requests_may_need():
    # Each needs 6 + 12 - 1 = 17 tokens = 5 blocks in the end, 2 at first.
    loop = create_loop(num_blocks=14)
    loop.add(*create_requests(3, prompt_tokens=6, max_tokens=12))
    step = loop.step()
    assert set(scheduled_tokens(step)) == {"0", "1"}
    loop.run()
    assert loop.scheduler.snapshot().num_preemptions == 0


def test_guaranteed_no_evict_admits_up_to_the_last_block():
    # Each needs 6 + 11 - 1 = 16 tokens = 4 blocks: the last token sampled takes no room.
    loop = create_loop(num_blocks=12)
    loop.add(*create_requests(3, prompt_tokens=6, max_tokens=11))
    assert loop.step().num_requests == 3
    assert loop.scheduler.snapshot().free_num_blocks == 6
    loop.run()
    assert loop.scheduler.snapshot().num_preemptions == 0


def test_guaranteed_no_evict_counts_shared_blocks_once():
    loop = create_loop(num_blocks=6)
    loop.add(create_request("a", range(12), 5))  # 16 tokens: 4 blocks, 3 of them shared below
    loop.step()
    loop.add(create_request("b", [*range(12), 99], 4))  # 4 blocks as well, 3 of them a's
    step = loop.step()
    assert scheduled_tokens(step) == {"a": 1, "b": 1}
    loop.run()
    assert loop.ended["b"].num_cached_tokens == 12


def test_guaranteed_no_evict_is_first_come_first_served():
    loop = create_loop(num_blocks=6)
    loop.add(create_request("a", range(8), 9))  # 4 blocks
    loop.add(create_request("b", range(50, 58), 9))  # 4: does not fit beside a
    loop.add(create_request("c", [99], 2))  # 1: would fit, and must not overtake b
    assert set(scheduled_tokens(loop.step())) == {"a"}
    starts = [new.request_id for step in loop.run() for new in step.new_requests]
    assert starts == ["b", "c"]


def test_max_utilization_admits_on_the_tokens_there_are():
    loop = create_loop(num_blocks=6, policy="max_utilization")
    loop.add(*create_requests(3, prompt_tokens=6, max_tokens=11))
    assert loop.step().num_requests == 3


def test_max_utilization_pauses_the_last_started_first():
    loop = create_loop(num_blocks=6, policy="max_utilization", enable_block_reuse=False)
    requests = create_requests(3, prompt_tokens=6, max_tokens=11)
    loop.add(*requests)
    first_pause = next(s for s in iter(loop.step, None) if s.finished_request_ids)
    # The third block of request 0 is what was missing; the last started gave way, and with its
    # blocks request 1 found one as well.
    assert first_pause.finished_request_ids == ["2"]
    assert set(scheduled_tokens(first_pause)) == {"0", "1"}
    paused_with = len(loop.tokens["2"])
    assert 0 < paused_with < 11
    steps = loop.run()
    again = next(new for step in steps for new in step.new_requests if new.request_id == "2")
    assert (again.num_prompt_tokens, len(again.token_ids)) == (6, 6 + paused_with)
    for request in requests:
        answer = expected_tokens(request.prompt_token_ids, 11)
        assert loop.tokens[request.request_id] == answer
    assert loop.scheduler.snapshot().num_preemptions >= 1


def test_the_first_started_is_never_paused():
    loop = create_loop(num_blocks=5, policy="max_utilization")
    loop.add(*create_requests(4, prompt_tokens=4, max_tokens=16))
    first = 0
    while loop.scheduler.has_unfinished_requests():
        while str(first) in loop.ended:
            first += 1
        step = loop.step()
        assert str(first) in scheduled_tokens(step)
        assert str(first) not in step.finished_request_ids or str(first) in loop.ended


def test_paused_requests_come_back_before_new_ones_in_their_order():
    loop = create_loop(num_blocks=8, policy="max_utilization", enable_block_reuse=False)
    loop.add(*create_requests(4, prompt_tokens=7, max_tokens=10))
    starts = [new.request_id for step in loop.run() for new in step.new_requests]
    back = starts[4:]
    assert loop.scheduler.snapshot().num_preemptions == len(back) > 0
    assert back[:2] == sorted(back[:2])


def test_a_paused_request_that_outgrew_a_step_is_recomputed_in_chunks():
    loop = create_loop(
        num_blocks=6, max_num_tokens=9, policy="max_utilization", enable_chunked_prefill=False
    )
    requests = create_requests(2, prompt_tokens=8, max_tokens=16)
    loop.add(*requests)
    loop.run()
    assert loop.scheduler.snapshot().num_preemptions > 0
    for request in requests:
        assert loop.tokens[request.request_id] == expected_tokens(request.prompt_token_ids, 16)


def test_nobody_starts_in_a_step_that_paused_someone():
    loop = create_loop(num_blocks=6, policy="max_utilization")
    loop.add(*create_requests(6, prompt_tokens=6, max_tokens=11))
    pauses = 0
    while loop.scheduler.has_unfinished_requests():
        step = loop.step()
        paused = loop.scheduler.snapshot().num_preemptions > pauses
        pauses = loop.scheduler.snapshot().num_preemptions
        assert not (paused and step.new_requests)
    assert pauses > 0


# --- reuse --------------------------------------------------------------------------------------


def test_a_prefix_is_computed_once():
    loop = create_loop()
    loop.add(create_request("a", range(10), 2))
    loop.run()
    loop.add(create_request("b", [*range(9), 77], 2))
    step = loop.step()
    # Two blocks are shared, and of the third its first token is copied.
    assert scheduled_tokens(step) == {"b": 1}
    assert step.prefills[0].num_computed_tokens == 9
    loop.run()
    assert loop.tokens["b"] == expected_tokens([*range(9), 77], 2)
    assert (loop.ended["a"].num_cached_tokens, loop.ended["b"].num_cached_tokens) == (0, 9)


def test_without_partial_reuse_whole_blocks_are_shared_alone():
    loop = create_loop(enable_partial_reuse=False)
    loop.add(create_request("a", range(10), 2))
    loop.run()
    loop.add(create_request("b", [*range(9), 77], 2))
    step = loop.step()
    assert scheduled_tokens(step) == {"b": 2}
    assert step.prefills[0].num_computed_tokens == 8
    assert step.block_copies == ([],)


def test_the_next_turn_of_a_conversation_reuses_the_answer():
    loop = create_loop()
    loop.add(create_request("a", range(6), 7))
    loop.run()
    history = [*range(6), *loop.tokens["a"]]  # 13 tokens, the last of them never computed
    loop.add(create_request("b", [*history, 1, 2], 1))
    loop.run()
    assert loop.ended["b"].num_cached_tokens == 12


def test_a_prefix_that_is_being_computed_is_waited_for():
    loop = create_loop()
    loop.add(create_request("a", range(10), 4), create_request("b", [*range(9), 77], 4))
    loop.add(create_request("c", [88, 89], 4))
    assert scheduled_tokens(loop.step()) == {"a": 10, "c": 2}  # b is put off, c is not held up
    assert scheduled_tokens(loop.step()) == {"a": 1, "c": 1, "b": 1}
    loop.run()
    assert loop.ended["b"].num_cached_tokens == 9
    assert loop.tokens["b"] == expected_tokens([*range(9), 77], 4)


def test_a_prefix_in_chunks_is_waited_for_to_its_end():
    loop = create_loop(max_num_tokens=8)
    loop.add(create_request("a", range(20), 1), create_request("b", [*range(20), 77], 1))
    steps = [scheduled_tokens(step) for step in loop.run()]
    assert steps == [{"a": 8}, {"a": 8}, {"a": 4}, {"b": 1}]


def test_nobody_waits_for_a_prefix_without_reuse_or_under_another_salt():
    loop = create_loop(enable_block_reuse=False)
    loop.add(create_request("a", range(8), 1), create_request("b", range(8), 1))
    assert loop.step().num_requests == 2
    loop = create_loop()
    loop.add(create_request("a", range(8), 1, cache_salt="x"), create_request("b", range(8), 1))
    assert loop.step().num_requests == 2


def test_a_request_put_off_goes_on_when_the_other_is_aborted():
    loop = create_loop()
    loop.add(create_request("a", range(10), 4), create_request("b", range(10), 4))
    loop.step(mid_step=lambda: loop.abort("a"))
    assert scheduled_tokens(loop.step()) == {"b": 10}
    loop.run()
    assert loop.tokens["b"] == expected_tokens(range(10), 4)


# --- abort --------------------------------------------------------------------------------------


def test_abort_while_waiting_leaves_no_trace():
    loop = create_loop(max_batch_size=1)
    loop.add(*create_requests(2))
    loop.step()
    assert loop.abort("1").token_ids == ()
    assert loop.abort("1") is None
    assert all("1" not in step.finished_request_ids for step in loop.run())


def test_abort_while_running_frees_blocks_and_tells_the_runner():
    loop = create_loop()
    loop.add(*create_requests(2))
    loop.step()
    loop.abort("0")
    assert loop.scheduler.snapshot().used_num_blocks == 2
    assert loop.step().finished_request_ids == ["0"]
    assert loop.runner.known_request_ids == {"1"}


def test_abort_under_way_drops_the_result_and_frees_the_blocks_at_once():
    # Steps are executed in their order, so whoever is given the blocks writes them later.
    loop = create_loop()
    loop.add(*create_requests(2))

    def mid_step():
        loop.abort("0")
        assert loop.scheduler.snapshot().used_num_blocks == 2

    loop.step(mid_step)
    assert loop.tokens["0"] == []
    assert loop.step().finished_request_ids == ["0"]


def test_an_id_aborted_under_way_may_be_used_again_at_once():
    loop = create_loop()
    loop.add(create_request("a", range(6)))

    def mid_step():
        loop.abort("a")
        del loop.ended["a"]
        loop.add(create_request("a", range(50, 53), 5))

    loop.step(mid_step)
    assert loop.tokens["a"] == []
    step = loop.step()
    assert step.finished_request_ids == ["a"]
    assert [new.request_id for new in step.new_requests] == ["a"]
    loop.run()
    assert loop.tokens["a"] == expected_tokens(range(50, 53), 5)


def test_ended_requests_are_announced_by_a_step_without_work():
    loop = create_loop()
    loop.add(create_request("a", range(3), 1))
    loop.step()
    assert not loop.scheduler.has_unfinished_requests()
    assert loop.scheduler.has_finished_requests()
    step = loop.step()
    assert (step.num_requests, step.finished_request_ids) == (0, ["a"])
    assert not loop.scheduler.has_finished_requests()
    assert loop.scheduler.snapshot().num_steps == 1


# --- the end of an answer -----------------------------------------------------------------------


def answer_with(tokens, *, max_tokens=10, max_seq_len=256, **request_settings):
    """Tokens and last output of a request whose runner samples these, a step each."""
    scheduler = create_scheduler(max_seq_len=max_seq_len)
    scheduler.add_request(create_request("a", [1, 2, 3], max_tokens, **request_settings), 0.0)
    answer = []
    for token_id in tokens:
        step = scheduler.schedule(2.5)
        runner_output = ModelRunnerOutput(token_ids={"a": [token_id]})
        (output,) = scheduler.update_from_output(step, runner_output)
        scheduler.check_integrity()
        answer += output.token_ids
        if output.finish_reason is not None:
            break
    assert scheduler.has_unfinished_requests() == (output.finish_reason is None)
    return answer, output


def test_runs_on_without_a_reason_to_stop():
    tokens, last = answer_with([7, 8])
    assert (tokens, last.finish_reason) == ([7, 8], None)
    assert last.queue_s == 2.5


def test_end_of_sequence_stops():
    tokens, last = answer_with([7, 9, 8], eos_token_ids=(9,), stop_token_ids=(8,))
    assert (tokens, last.finish_reason, last.stop_reason) == ([7, 9], FinishReason.STOP, None)


def test_a_stop_token_is_named():
    tokens, last = answer_with([7, 8, 9], eos_token_ids=(9,), stop_token_ids=(8,))
    assert (tokens, last.finish_reason, last.stop_reason) == ([7, 8], FinishReason.STOP, 8)


def test_ignore_eos_goes_on():
    tokens, last = answer_with([7, 9, 8], eos_token_ids=(9,), ignore_eos=True)
    assert (tokens, last.finish_reason) == ([7, 9, 8], None)


def test_max_tokens_cuts():
    tokens, last = answer_with([7, 8, 9], max_tokens=2)
    assert (tokens, last.finish_reason) == ([7, 8], FinishReason.LENGTH)


def test_a_stop_token_wins_over_the_limit_it_meets():
    _, last = answer_with([7, 8], max_tokens=2, stop_token_ids=(8,))
    assert last.finish_reason is FinishReason.STOP


def test_a_full_context_ends_the_answer():
    tokens, last = answer_with([7, 8, 9], max_tokens=None, max_seq_len=5)
    assert (tokens, last.finish_reason) == ([7, 8], FinishReason.LENGTH)


def test_an_error_of_one_request_leaves_the_others_alone():
    loop = create_loop(errors={"1": "NaN in the logits"})
    requests = create_requests(3)
    loop.add(*requests)
    loop.run()
    assert loop.ended["1"].finish_reason is FinishReason.ERROR
    assert loop.ended["1"].error == "NaN in the logits"
    for i in (0, 2):
        assert loop.tokens[str(i)] == expected_tokens(requests[i].prompt_token_ids, 8)
    assert loop.kv.usage().free == loop.kv.usage().total


# --- the protocol with the runner ---------------------------------------------------------------


def test_a_third_step_waits_for_the_first():
    scheduler = create_scheduler()
    scheduler.add_request(create_request("a", [1]), 0.0)
    scheduler.schedule(0.0)
    scheduler.schedule(0.0)
    with pytest.raises(RuntimeError, match="2 steps are under way already"):
        scheduler.schedule(0.0)


@pytest.mark.parametrize(
    ("prompt_tokens", "sampled"),
    [(3, []), (100, [1]), (3, [1, 2])],
    ids=["none from a whole prompt", "one from a chunk", "two without a guess"],
)
def test_a_runner_that_samples_wrongly_is_the_engines_fault(prompt_tokens, sampled):
    scheduler = create_scheduler(max_num_tokens=64)
    scheduler.add_request(create_request("a", range(prompt_tokens)), 0.0)
    step = scheduler.schedule(0.0)
    with pytest.raises(EngineError, match=f"sampled {len(sampled)} tokens for a"):
        scheduler.update_from_output(step, ModelRunnerOutput(token_ids={"a": sampled}))


def test_the_output_of_another_step_is_refused():
    scheduler = create_scheduler()
    scheduler.add_request(create_request("a", [1]), 0.0)
    scheduler.schedule(0.0)
    second = scheduler.schedule(0.0)
    with pytest.raises(EngineError, match="step 1 is not the oldest one under way"):
        scheduler.update_from_output(second, ModelRunnerOutput(token_ids={"a": [1]}))


def test_steps_are_numbered():
    loop = create_loop()
    loop.add(create_request("a", [1], 3))
    assert [step.step_id for step in loop.run()] == [0, 1, 2]


def test_block_tables_come_whole_and_then_by_increments_for_every_group():
    loop = create_loop(num_blocks=(64, 32))
    loop.add(create_request("a", range(6), 4))
    new = [
        {
            request_id: [len(ids) for ids in table]
            for request_id, table in step.new_block_ids.items()
        }
        for step in loop.run()
    ]
    assert new == [{"a": [2, 2]}, {}, {}, {"a": [1, 1]}]


# --- counters -----------------------------------------------------------------------------------


def test_counters_add_up():
    loop = create_loop(errors={"bad": "as asked"})
    loop.add(create_request("a", range(10), 3))
    loop.run()
    loop.add(create_request("b", [*range(9), 77], 3), create_request("bad", [5], 3))
    loop.add(create_request("gone", [6], 3))
    loop.abort("gone")
    loop.run()
    stats = loop.scheduler.snapshot()
    assert stats.prompt_tokens == stats.prefix_cache_queries_tokens == 10 + 10 + 1
    assert stats.prefix_cache_hits_tokens == 9
    assert (stats.reused_blocks, stats.missed_blocks) == (3, 2)
    assert stats.generation_tokens == 6
    assert stats.num_steps == 6
    assert stats.finished == {"length": 2, "error": 1, "abort": 1}
    assert (stats.num_running_requests, stats.num_queued_requests) == (0, 0)
    assert (stats.max_num_blocks, stats.free_num_blocks, stats.used_num_blocks) == (64, 64, 0)
    # Three of a, and b, which shared two of them, filled one itself.
    assert stats.cached_num_blocks == 4
    stats.finished["length"] = 99
    assert loop.scheduler.snapshot().finished["length"] == 2


def test_a_pause_counts_a_prompt_only_once():
    loop = create_loop(num_blocks=6, policy="max_utilization")
    loop.add(*create_requests(3, prompt_tokens=6, max_tokens=11))
    loop.run()
    stats = loop.scheduler.snapshot()
    assert stats.num_preemptions > 0
    assert stats.prompt_tokens == stats.prefix_cache_queries_tokens == 18
    assert stats.generation_tokens == 33
    assert stats.prefix_cache_hits_tokens == 0


def test_without_reuse_nothing_is_looked_up():
    loop = create_loop(enable_block_reuse=False)
    loop.add(*create_requests(2))
    loop.run()
    stats = loop.scheduler.snapshot()
    assert (stats.prefix_cache_queries_tokens, stats.reused_blocks) == (0, 0)
    assert stats.missed_blocks == 2


def test_queue_time_ends_with_the_first_start():
    loop = create_loop(max_batch_size=1)
    loop.add(*create_requests(2, max_tokens=3))
    loop.run()
    assert [loop.ended[i].queue_s for i in ("0", "1")] == [1.0, 4.0]


# --- steps ahead --------------------------------------------------------------------------------


def sample(scheduler, step, token_id=7):
    """The answer of a runner that samples this token wherever one is wanted."""
    sampled = list(step.decodes)
    for prefill in step.prefills:
        state = scheduler._requests.get(prefill.request_id)
        if state and prefill.num_computed_tokens + prefill.num_tokens == state.num_prefill_tokens:
            sampled.append(prefill.request_id)
    return ModelRunnerOutput(token_ids={request_id: [token_id] for request_id in sampled})


def test_a_step_may_be_scheduled_before_the_last_is_back():
    scheduler = create_scheduler()
    scheduler.add_request(create_request("a", [1, 2, 3], 3), 0.0)
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    assert (scheduled_tokens(first), scheduled_tokens(second)) == ({"a": 3}, {"a": 1})
    assert second.decodes == ["a"]
    (output,) = scheduler.update_from_output(first, sample(scheduler, first))
    assert list(output.token_ids) == [7]
    third = scheduler.schedule(0.0)
    scheduler.update_from_output(second, sample(scheduler, second))
    # The third token is the last one: it is known without its value that none follows.
    assert scheduler.schedule(0.0).num_requests == 0
    (output,) = scheduler.update_from_output(third, sample(scheduler, third))
    assert output.finish_reason is FinishReason.LENGTH


def test_what_a_step_ahead_brings_for_an_ended_request_is_dropped():
    scheduler = create_scheduler()
    scheduler.add_request(create_request("a", [1, 2, 3], 8, eos_token_ids=(9,)), 0.0)
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    (output,) = scheduler.update_from_output(first, sample(scheduler, first, 9))
    assert output.finish_reason is FinishReason.STOP
    assert scheduler.schedule(0.0).finished_request_ids == ["a"]
    assert scheduler.update_from_output(second, ModelRunnerOutput(token_ids={"a": [5]})) == []
    scheduler.check_integrity()


def test_a_request_paused_by_a_step_ahead_gets_the_token_that_is_under_way():
    scheduler = create_scheduler(num_blocks=4, policy="max_utilization", enable_block_reuse=False)
    for request_id in "ab":
        scheduler.add_request(create_request(request_id, [1] * 7, 9), 0.0)
    first = scheduler.schedule(0.0)
    second = scheduler.schedule(0.0)
    scheduler.update_from_output(first, sample(scheduler, first))
    third = scheduler.schedule(0.0)  # a's third block: b is paused, the second step under way
    assert third.finished_request_ids == ["b"]
    outputs = scheduler.update_from_output(second, sample(scheduler, second))
    assert [output.request_id for output in outputs] == ["a", "b"]
    scheduler.update_from_output(third, sample(scheduler, third))
    scheduler.abort_request("a")
    (again,) = scheduler.schedule(0.0).new_requests
    assert (again.request_id, again.token_ids) == ("b", [1] * 7 + [7, 7])


def test_a_prefix_computed_by_a_step_under_way_is_waited_for():
    scheduler = create_scheduler()
    scheduler.add_request(create_request("a", range(10), 4), 0.0)
    scheduler.schedule(0.0)
    scheduler.add_request(create_request("b", [*range(9), 77], 4), 0.0)
    assert scheduled_tokens(scheduler.schedule(0.0)) == {"a": 1}


# --- priorities and timeouts --------------------------------------------------------------------


def test_lower_priorities_wait_for_higher_ones():
    loop = create_loop(max_batch_size=1)
    loop.add(create_request("batch", [1], 1, priority=10), create_request("second", [2], 1))
    loop.add(create_request("urgent", [3], 1, priority=-5))
    starts = [new.request_id for step in loop.run() for new in step.new_requests]
    assert starts == ["urgent", "second", "batch"]


def test_batch_requests_still_move():
    loop = create_loop(max_batch_size=1)
    loop.add(create_request("batch", [1], 1, priority=10))
    for i in range(20):
        loop.add(create_request(str(i), [i], 1))
    starts = [new.request_id for step in loop.run() for new in step.new_requests]
    assert starts.index("batch") == 7


def test_of_running_requests_the_least_urgent_are_paused_first():
    loop = create_loop(num_blocks=6, policy="max_utilization", enable_block_reuse=False)
    loop.add(create_request("batch", range(6), 11, priority=10))
    loop.step()
    loop.add(create_request("a", range(50, 56), 11), create_request("b", range(60, 66), 11))
    first_pause = next(s for s in iter(loop.step, None) if s.finished_request_ids)
    assert first_pause.finished_request_ids == ["batch"]
    loop.run()
    assert loop.tokens["batch"] == expected_tokens(range(6), 11)


def test_nobody_of_their_rank_starts_before_those_who_gave_way():
    loop = create_loop(
        num_blocks=12, max_batch_size=2, policy="max_utilization", enable_block_reuse=False
    )
    loop.add(create_request("first", range(36), 12, priority=10))
    loop.step()
    loop.add(create_request("younger", range(50, 58), 12, priority=10))
    loop.add(create_request("urgent", range(60, 76), 12))
    step = loop.step()
    assert step.finished_request_ids == ["first"]
    assert [new.request_id for new in step.new_requests] == ["urgent"]
    starts = [new.request_id for step in loop.run() for new in step.new_requests]
    assert starts[0] == "first"


def test_a_timeout_ends_a_request_wherever_it_is():
    loop = create_loop(max_batch_size=1)
    loop.add(create_request("runs", [1], 50, timeout_s=3.5))
    loop.add(create_request("waits", [2], 9, timeout_s=2))
    loop.add(create_request("ends", [3], 1, timeout_s=60))
    num_steps = 0
    while loop.scheduler.has_unfinished_requests():
        loop.step()
        loop.expire()
        num_steps += 1
    assert len(loop.tokens["runs"]) == 4
    for request_id, timeout in (("runs", 3.5), ("waits", 2)):
        assert loop.ended[request_id].finish_reason is FinishReason.TIMEOUT
        assert loop.ended[request_id].error == (
            f"the request did not end within its timeout of {timeout} s"
        )
    assert loop.ended["ends"].finish_reason is FinishReason.LENGTH
    assert num_steps == 5
    assert loop.scheduler.snapshot().finished == {"timeout": 2, "length": 1}


def test_ended_requests_are_not_kept_for_their_timeouts():
    loop = create_loop()
    for i in range(50):
        loop.add(create_request(str(i), [i], 1, timeout_s=1e6))
        loop.run()
    assert len(loop.scheduler._deadlines) <= 3


# --- prompt log-probabilities, constraints, guesses ---------------------------------------------


def test_prompt_logprobs_are_gathered_over_chunks_and_never_reused():
    loop = create_loop(max_num_tokens=8)
    loop.add(create_request("a", range(20), 2))
    loop.run()
    loop.add(create_request("b", range(20), 2, prompt_logprobs=0))
    outputs = []
    while loop.scheduler.has_unfinished_requests():
        step = loop.scheduler.schedule(0.0)
        result = loop.runner.finish(loop.runner.launch(step))
        outputs += loop.scheduler.update_from_output(step, result)
    assert [len(output.prompt_logprobs or ()) for output in outputs] == [19, 0]
    assert outputs[0].num_cached_tokens == 0


class EndsAfter:
    def __init__(self, count):
        self.left = count

    def mask(self):
        return np.full(8, -1, dtype=np.int32)

    def accept(self, token_id):
        self.left -= 1
        return self.left == 0


def test_a_constraint_ends_the_answer():
    loop = create_loop()
    constraint = EndsAfter(3)
    loop.add(create_request("a", [1, 2], 9), constraint=constraint)
    loop.run()
    assert loop.ended["a"].finish_reason is FinishReason.STOP
    assert loop.tokens["a"] == expected_tokens([1, 2], 3)


def test_only_requests_that_sample_are_asked_for_constraints():
    scheduler = create_scheduler(max_num_tokens=8)
    scheduler.add_request(create_request("a", range(12), 9), 0.0, EndsAfter(3))
    first = scheduler.schedule(0.0)
    assert scheduler.constraints(first) == {}
    second = scheduler.schedule(0.0)
    scheduler.update_from_output(first, ModelRunnerOutput())
    assert set(scheduler.constraints(second)) == {"a"}


def guessing(sampled, logprobs, **request_settings):
    """The output of a step that verified the guess 8, 9, 10 behind the tokens 1, 2, 3 and 7."""
    scheduler = create_scheduler(speculator=Guesses(8, 9, 10))
    request = create_request("a", [1, 2, 3], logprobs=0, **request_settings)
    scheduler.add_request(request, 0.0)
    step = scheduler.schedule(0.0)
    result = ModelRunnerOutput(token_ids={"a": [7]}, logprobs={"a": logprobs[:1]})
    scheduler.update_from_output(step, result)
    step = scheduler.schedule(0.0)
    result = ModelRunnerOutput(token_ids={"a": sampled}, logprobs={"a": logprobs[1:]})
    (output,) = scheduler.update_from_output(step, result)
    scheduler.check_integrity()
    return output


def test_what_follows_the_end_within_verified_guesses_is_cut():
    logprobs = [TokenLogprobs(-0.5 * i, i) for i in range(1, 5)]
    output = guessing([8, 9, 10], logprobs, eos_token_ids=(9,))
    assert (output.token_ids, output.finish_reason) == ([8, 9], FinishReason.STOP)
    assert output.logprobs == logprobs[1:3]


class Guesses:
    """Stands where a Speculator does."""

    def __init__(self, *guess):
        self.guess, self.guesses, self.seen = list(guess), {}, []

    def extended(self, request_id, token_ids):
        self.seen.append(list(token_ids))
        self.guesses = {request_id: self.guess}

    def forget(self, request_id):
        self.guesses.pop(request_id, None)


def test_guesses_are_verified_and_wrong_ones_rolled_back():
    speculator = Guesses(8, 9, 10)
    scheduler = create_scheduler(tokens_per_block=2, speculator=speculator)
    scheduler.add_request(create_request("a", [1, 2, 3], 20), 0.0)
    assert scheduler.may_run_ahead
    step = scheduler.schedule(0.0)
    scheduler.update_from_output(step, ModelRunnerOutput(token_ids={"a": [7]}))
    assert not scheduler.may_run_ahead
    step = scheduler.schedule(0.0)
    assert step.draft_token_ids == {"a": [8, 9, 10]}
    assert step.num_tokens == 4
    (ids,) = step.new_block_ids["a"]
    assert len(ids) == 2  # tokens 3 to 6, of which there was room for one
    (output,) = scheduler.update_from_output(step, ModelRunnerOutput(token_ids={"a": [8, 5]}))
    assert output.token_ids == [8, 5]
    assert speculator.seen == [[1, 2, 3, 7], [1, 2, 3, 7, 8, 5]]
    scheduler.check_integrity()
    assert scheduler._requests["a"].num_computed_tokens == 5
    stats = scheduler.snapshot()
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_draft_tokens) == (1, 3, 1)


def test_no_step_is_scheduled_ahead_of_one_that_verifies_guesses():
    speculator = Guesses(8, 9, 10)
    scheduler = create_scheduler(speculator=speculator)
    scheduler.add_request(create_request("a", [1, 2, 3], 20), 0.0)
    step = scheduler.schedule(0.0)
    scheduler.update_from_output(step, ModelRunnerOutput(token_ids={"a": [7]}))
    assert scheduler.schedule(0.0).draft_token_ids
    speculator.guesses = {}  # as when another request left, and it pays no more
    assert not scheduler.may_run_ahead


def test_guesses_take_what_the_budget_and_the_answer_leave():
    scheduler = create_scheduler(max_num_tokens=8, max_batch_size=4, speculator=Guesses(*range(20)))
    scheduler.add_request(create_request("a", [1, 2, 3], 20), 0.0)
    step = scheduler.schedule(0.0)
    scheduler.update_from_output(step, ModelRunnerOutput(token_ids={"a": [7]}))
    scheduler.add_request(create_request("b", range(50, 55), 1), 0.0)
    step = scheduler.schedule(0.0)
    assert scheduled_tokens(step) == {"a": 3, "b": 5}
    scheduler = create_scheduler(speculator=Guesses(*range(20)))
    scheduler.add_request(create_request("a", [1, 2, 3], 4), 0.0)
    step = scheduler.schedule(0.0)
    scheduler.update_from_output(step, ModelRunnerOutput(token_ids={"a": [7]}))
    # Three more tokens may come: two guesses and the one behind them.
    assert scheduler.schedule(0.0).draft_token_ids == {"a": [0, 1]}
