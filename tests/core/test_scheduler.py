"""Each rule of the scheduler on its own; random histories are in test_scheduler_machine."""

from __future__ import annotations

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


def test_more_decodes_than_budget_run_in_the_order_of_their_start():
    loop = create_loop(max_num_tokens=2)
    loop.add(*(create_request(str(i), [i], 3) for i in range(3)))
    assert scheduled_tokens(loop.step()) == {"0": 1, "1": 1}
    assert scheduled_tokens(loop.step()) == {"0": 1, "1": 1}
    loop.run()
    assert all(len(tokens) == 3 for tokens in loop.tokens.values())


def test_the_batch_never_holds_more_than_max_batch_size():
    loop = create_loop(max_batch_size=2)
    loop.add(*create_requests(5))
    assert max(len(step.scheduled) for step in loop.run()) == 2
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
    assert len(loop.step().scheduled) == 3
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
    assert len(loop.step().scheduled) == 3


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
    assert scheduled_tokens(step) == {"b": 2}
    assert step.scheduled[0].num_computed_tokens == 8
    loop.run()
    assert loop.tokens["b"] == expected_tokens([*range(9), 77], 2)
    assert (loop.ended["a"].num_cached_tokens, loop.ended["b"].num_cached_tokens) == (0, 8)


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
    assert scheduled_tokens(loop.step()) == {"a": 1, "c": 1, "b": 2}
    loop.run()
    assert loop.ended["b"].num_cached_tokens == 8
    assert loop.tokens["b"] == expected_tokens([*range(9), 77], 4)


def test_a_prefix_in_chunks_is_waited_for_to_its_end():
    loop = create_loop(max_num_tokens=8)
    loop.add(create_request("a", range(20), 1), create_request("b", [*range(20), 77], 1))
    steps = [scheduled_tokens(step) for step in loop.run()]
    assert steps == [{"a": 8}, {"a": 8}, {"a": 4}, {"b": 1}]


def test_nobody_waits_for_a_prefix_without_reuse_or_under_another_salt():
    loop = create_loop(enable_block_reuse=False)
    loop.add(create_request("a", range(8), 1), create_request("b", range(8), 1))
    assert len(loop.step().scheduled) == 2
    loop = create_loop()
    loop.add(create_request("a", range(8), 1, cache_salt="x"), create_request("b", range(8), 1))
    assert len(loop.step().scheduled) == 2


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


def test_abort_under_way_drops_the_result_and_keeps_the_blocks_until_the_step_is_done():
    loop = create_loop()
    loop.add(*create_requests(2))

    def mid_step():
        loop.abort("0")
        assert loop.scheduler.snapshot().used_num_blocks == 4

    loop.step(mid_step)
    assert loop.tokens["0"] == []
    assert loop.scheduler.snapshot().used_num_blocks == 2
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
    assert (step.scheduled, step.finished_request_ids) == ([], ["a"])
    assert not loop.scheduler.has_finished_requests()
    assert loop.scheduler.snapshot().num_steps == 1


# --- the end of an answer -----------------------------------------------------------------------


def answer_with(tokens, *, max_tokens=10, max_seq_len=256, logprobs=None, **request_settings):
    """The last output of a request whose runner samples all of ``tokens`` in one step."""
    scheduler = create_scheduler(max_seq_len=max_seq_len)
    scheduler.add_request(create_request("a", [1, 2, 3], max_tokens, **request_settings), 0.0)
    step = scheduler.schedule(2.5)
    output = ModelRunnerOutput(token_ids={"a": tokens}, logprobs=logprobs or {})
    (answer,) = scheduler.update_from_output(step, output)
    scheduler.check_integrity()
    assert scheduler.has_unfinished_requests() == (answer.finish_reason is None)
    return answer


def test_runs_on_without_a_reason_to_stop():
    answer = answer_with([7, 8])
    assert (answer.token_ids, answer.finish_reason) == ((7, 8), None)
    assert answer.queue_s == 2.5


def test_end_of_sequence_stops_and_cuts_what_follows():
    answer = answer_with([7, 9, 8], eos_token_ids=(9,), stop_token_ids=(8,))
    assert (answer.token_ids, answer.finish_reason) == ((7, 9), FinishReason.STOP)
    assert answer.stop_reason is None


def test_a_stop_token_is_named():
    answer = answer_with([7, 8, 9], eos_token_ids=(9,), stop_token_ids=(8,))
    assert (answer.token_ids, answer.finish_reason) == ((7, 8), FinishReason.STOP)
    assert answer.stop_reason == 8


def test_ignore_eos_goes_on():
    answer = answer_with([7, 9, 8], eos_token_ids=(9,), ignore_eos=True)
    assert answer.finish_reason is None


def test_max_tokens_cuts():
    answer = answer_with([7, 8, 9], max_tokens=2)
    assert (answer.token_ids, answer.finish_reason) == ((7, 8), FinishReason.LENGTH)


def test_a_stop_token_wins_over_the_limit_it_meets():
    answer = answer_with([7, 8], max_tokens=2, stop_token_ids=(8,))
    assert answer.finish_reason is FinishReason.STOP


def test_a_full_context_ends_the_answer():
    answer = answer_with([7, 8, 9], max_tokens=None, max_seq_len=5)
    assert (answer.token_ids, answer.finish_reason) == ((7, 8), FinishReason.LENGTH)


def test_logprobs_are_cut_with_their_tokens():
    logprobs = [TokenLogprobs(-0.5, 1), TokenLogprobs(-1.5, 2)]
    answer = answer_with([7, 8], max_tokens=1, logprobs={"a": logprobs})
    assert answer.logprobs == (logprobs[0],)
    assert answer_with([7, 8]).logprobs is None


def test_tokens_beyond_what_was_computed_are_computed_next():
    # Several tokens from a step that had no drafts: their KV is not in the cache.
    scheduler = create_scheduler()
    scheduler.add_request(create_request("a", [1, 2, 3]), 0.0)
    step = scheduler.schedule(0.0)
    scheduler.update_from_output(step, ModelRunnerOutput(token_ids={"a": [7, 8, 9]}))
    (scheduled,) = scheduler.schedule(0.0).scheduled
    assert (scheduled.num_computed_tokens, scheduled.num_tokens) == (3, 3)


def test_a_running_request_that_gets_nothing_ends_the_round():
    scheduler = create_scheduler(max_num_tokens=4)
    for request_id in "ab":
        scheduler.add_request(create_request(request_id, [1], 20), 0.0)
    step = scheduler.schedule(0.0)
    sampled = {"a": [7, 8, 9], "b": [7, 8, 9]}
    scheduler.update_from_output(step, ModelRunnerOutput(token_ids=sampled))
    scheduler.add_request(create_request("c", [2]), 0.0)
    # One token is left: no block of b's three, and c, which would fit, must not overtake b.
    assert scheduled_tokens(scheduler.schedule(0.0)) == {"a": 3}


def test_rejected_drafts_are_rolled_back():
    scheduler = create_scheduler(tokens_per_block=2)
    scheduler.add_request(create_request("a", [1, 2, 3]), 0.0)
    step = scheduler.schedule(0.0)
    scheduler.update_from_output(step, ModelRunnerOutput(token_ids={"a": [7]}))
    step = scheduler.schedule(0.0)
    step.scheduled[0].num_tokens += 3  # as if three drafts had been computed with it
    scheduler.update_from_output(step, ModelRunnerOutput(token_ids={"a": [8, 9]}))  # one accepted
    (scheduled,) = scheduler.schedule(0.0).scheduled
    assert (scheduled.num_computed_tokens, scheduled.num_tokens) == (5, 1)
    scheduler.check_integrity()


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


def test_a_second_step_waits_for_the_first():
    scheduler = create_scheduler()
    scheduler.add_request(create_request("a", [1]), 0.0)
    scheduler.schedule(0.0)
    with pytest.raises(RuntimeError, match="before update_from_output"):
        scheduler.schedule(0.0)


@pytest.mark.parametrize(
    ("prompt_tokens", "sampled"),
    [(3, []), (100, [1])],
    ids=["none from a whole prompt", "one from a chunk"],
)
def test_a_runner_that_samples_wrongly_is_the_engines_fault(prompt_tokens, sampled):
    scheduler = create_scheduler(max_num_tokens=64)
    scheduler.add_request(create_request("a", range(prompt_tokens)), 0.0)
    step = scheduler.schedule(0.0)
    with pytest.raises(EngineError, match=f"sampled {len(sampled)} tokens for a"):
        scheduler.update_from_output(step, ModelRunnerOutput(token_ids={"a": sampled}))


def test_the_output_of_another_step_is_refused():
    scheduler = create_scheduler()
    empty = scheduler.schedule(0.0)
    scheduler.add_request(create_request("a", [1]), 0.0)
    scheduler.schedule(0.0)
    with pytest.raises(EngineError, match="step 0 is not the step under way"):
        scheduler.update_from_output(empty, ModelRunnerOutput())


def test_steps_are_numbered():
    loop = create_loop()
    loop.add(create_request("a", [1], 3))
    assert [step.step_id for step in loop.run()] == [0, 1, 2]


def test_block_tables_come_whole_and_then_by_increments_for_every_group():
    loop = create_loop(num_blocks=(64, 32))
    loop.add(create_request("a", range(6), 4))
    new = [[len(ids) for ids in step.scheduled[0].new_block_ids] for step in loop.run()]
    assert new == [[2, 2], [0, 0], [0, 0], [1, 1]]


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
    assert stats.prefix_cache_hits_tokens == 8
    assert (stats.reused_blocks, stats.missed_blocks) == (2, 2)
    assert stats.generation_tokens == 6
    assert stats.num_steps == 6
    assert stats.finished == {"length": 2, "error": 1, "abort": 1}
    assert (stats.num_running_requests, stats.num_queued_requests) == (0, 0)
    assert (stats.max_num_blocks, stats.free_num_blocks, stats.used_num_blocks) == (64, 64, 0)
    assert stats.cached_num_blocks == 4  # three of a; b shared two of them and filled one itself
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
