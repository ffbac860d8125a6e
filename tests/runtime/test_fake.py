"""The fake runner answers as it says, and sees a scheduler's mistakes."""

import time

import pytest

from llmserve.core.sampling_params import SamplingParams
from llmserve.core.step import NewRequest, ScheduledRequest, SchedulerOutput
from llmserve.runtime.fake import FakeRunner, expected_tokens


def create_runner(num_blocks=(8,), **settings) -> FakeRunner:
    runner = FakeRunner(num_groups=len(num_blocks), max_num_tokens=16, max_batch_size=2, **settings)
    runner.allocate_kv_cache(num_blocks)
    return runner


def run(runner: FakeRunner, *scheduled: ScheduledRequest, new=(), finished=()):
    step = SchedulerOutput(
        step_id=runner.num_steps,
        finished_request_ids=list(finished),
        new_requests=[
            NewRequest(
                request_id=request_id,
                token_ids=list(tokens),
                num_prompt_tokens=len(tokens),
                sampling_params=SamplingParams(),
            )
            for request_id, tokens in new
        ],
        scheduled=list(scheduled),
    )
    return runner.finish(runner.launch(step))


def part(request_id, start, count, *new_block_ids) -> ScheduledRequest:
    return ScheduledRequest(
        request_id=request_id,
        num_computed_tokens=start,
        num_tokens=count,
        new_block_ids=tuple(list(ids) for ids in new_block_ids),
    )


def test_expected_tokens_is_a_pure_function_of_the_whole_prompt():
    first = expected_tokens([1, 2, 3], 5, vocab_size=1000)
    assert expected_tokens([1, 2, 3], 5, vocab_size=1000) == first
    assert expected_tokens([1, 2, 3, *first[:2]], 3, vocab_size=1000) == first[2:]
    assert expected_tokens([9, 2, 3], 5, vocab_size=1000) != first
    assert all(0 <= token < 7 for token in expected_tokens([1], 50, vocab_size=7))


def test_chunks_shared_blocks_and_decodes_give_the_expected_tokens():
    runner = create_runner((8, 8))
    prompt = [5, 6, 7, 8, 9, 10]
    assert run(runner, part("a", 0, 4, [3], [1]), new=[("a", prompt)]).token_ids == {}
    tokens = run(runner, part("a", 4, 2, [0], [7])).token_ids["a"]
    tokens += run(runner, part("a", 6, 1, [], [])).token_ids["a"]
    assert tokens == expected_tokens(prompt, 2)
    other = [5, 6, 7, 8, 1]
    output = run(runner, part("b", 4, 1, [3, 5], [1, 2]), new=[("b", other)])
    assert output.token_ids["b"] == expected_tokens(other, 1)


def test_a_block_of_another_prefix_changes_the_answer():
    # The tokens in the shared block are the right ones; what came before them is not.
    runner = create_runner()
    run(runner, part("a", 0, 8, [0, 1]), new=[("a", [9, 9, 9, 9, 5, 6, 7, 8])])
    run(runner, part("b", 0, 4, [2]), new=[("b", [1, 2, 3, 4])])
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 0]
    output = run(runner, part("c", 8, 1, [2, 1, 3]), new=[("c", prompt)])
    assert output.token_ids["c"] != expected_tokens(prompt, 1)


def started() -> FakeRunner:
    """Request a, prompt 0 to 5 in blocks 0 and 1, one token generated."""
    runner = create_runner()
    run(runner, part("a", 0, 6, [0, 1]), new=[("a", range(6))])
    return runner


@pytest.mark.parametrize(
    ("scheduled", "new", "message"),
    [
        ([part("b", 0, 2, [1])], [("b", [1, 2])], "block 1 is written and shared"),
        ([part("b", 4, 1, [0, 2])], [("b", [0, 1, 2, 9, 4])], "block 0 holds"),
        ([part("b", 4, 1, [5, 2])], [("b", range(5))], "block 5 was never written"),
        ([part("a", 7, 1, [])], [], "has no tokens up to 8"),
        ([part("a", 5, 3, [])], [], "has no tokens up to 8"),
        ([part("b", 0, 5, [2])], [("b", range(5))], "the block table is too short"),
        ([part("b", 0, 1, [8])], [("b", [1])], "there is no block 8"),
        ([part("b", 0, 17, [2, 3, 4, 5, 6])], [("b", range(17))], "more tokens than max_num"),
        ([part(i, 0, 1, [2]) for i in "bcd"], [(i, [1]) for i in "bcd"], "max_batch_size"),
        ([part("a", 6, 1, []), part("a", 6, 1, [])], [], "scheduled twice"),
        ([part("a", 6, 0, [])], [], "nothing to compute"),
        ([], [("b", [1])], "new, not computed"),
        ([part("a", 0, 1, [2])], [("a", [1])], "a is known already"),
    ],
)
def test_sees_a_scheduler_that_breaks_the_rules(scheduled, new, message):
    with pytest.raises(AssertionError, match=message):
        run(started(), *scheduled, new=new)


def test_sees_a_block_that_is_given_to_two_requests_in_one_step():
    with pytest.raises(AssertionError, match="block 2 is written and shared"):
        run(started(), *(part(i, 0, 1, [2]) for i in "bc"), new=[(i, [1]) for i in "bc"])


def test_sees_that_an_unknown_request_ends():
    with pytest.raises(AssertionError, match="b ends and was never told of"):
        run(started(), finished=["b"])


def test_sees_groups_that_disagree():
    runner = create_runner((8, 8))
    run(runner, part("a", 0, 4, [0], [0]), new=[("a", [9, 9, 9, 9])])
    run(runner, part("b", 0, 8, [1, 2], [1, 2]), new=[("b", [1, 1, 1, 1, 2, 2, 2, 2])])
    run(runner, part("c", 0, 8, [3, 4], [3, 4]), new=[("c", [3, 3, 3, 3, 2, 2, 2, 2])])
    prompt = [1, 1, 1, 1, 2, 2, 2, 2, 5]
    with pytest.raises(AssertionError, match="the KV groups disagree"):
        run(runner, part("d", 8, 1, [1, 2, 5], [1, 4, 5]), new=[("d", prompt)])


def test_at_most_one_step_is_under_way():
    runner = create_runner()
    runner.launch(SchedulerOutput(step_id=0))
    with pytest.raises(AssertionError, match="under way already"):
        runner.launch(SchedulerOutput(step_id=1))


def test_fails_at_the_step_it_is_told():
    runner = create_runner(fail_at_step=1)
    run(runner)
    with pytest.raises(RuntimeError, match="step 1"):
        run(runner)
    run(runner)


def test_fails_the_request_it_is_told():
    runner = create_runner(errors={"a": "as asked"})
    output = run(runner, part("a", 0, 1, [0]), part("b", 0, 1, [1]), new=[("a", [1]), ("b", [2])])
    assert output.errors == {"a": "as asked"}
    assert output.token_ids == {"b": expected_tokens([2], 1)}


def test_a_step_takes_the_time_it_is_told():
    runner = create_runner(step_s=0.05)
    start = time.monotonic()
    run(runner)
    assert time.monotonic() - start >= 0.05
