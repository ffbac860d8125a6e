"""The fake runner answers as it says, and sees a scheduler's mistakes."""

import time

import numpy as np
import pytest

from llmserve.core.sampling_params import SamplingParams
from llmserve.core.step import NewRequest, ScheduledPrefill, SchedulerOutput
from llmserve.runtime.fake import FakeRunner, expected_prompt_logprobs, expected_tokens


def create_runner(num_blocks=(8,), **settings) -> FakeRunner:
    windows = settings.pop("windows", (None,) * len(num_blocks))
    runner = FakeRunner(windows=windows, max_num_tokens=16, max_batch_size=2, **settings)
    runner.allocate_kv_cache(num_blocks)
    return runner


def run(runner, *prefills, new=(), blocks=None, masks=None, params=None, **fields):
    """Execute one step: ``prefills`` are (request_id, start, count), ``blocks`` ids per group."""
    step = SchedulerOutput(
        step_id=runner.num_steps,
        new_requests=[
            NewRequest(
                request_id=request_id,
                token_ids=list(tokens),
                num_prompt_tokens=len(tokens),
                sampling_params=params or SamplingParams(),
            )
            for request_id, tokens in new
        ],
        new_block_ids={
            request_id: tuple(list(ids) for ids in groups)
            for request_id, groups in (blocks or {}).items()
        },
        prefills=[
            ScheduledPrefill(request_id=request_id, num_computed_tokens=start, num_tokens=count)
            for request_id, start, count in prefills
        ],
        **fields,
    )
    return runner.finish(runner.launch(step), masks)


def test_expected_tokens_is_a_pure_function_of_the_whole_prompt():
    first = expected_tokens([1, 2, 3], 5, vocab_size=1000)
    assert expected_tokens([1, 2, 3], 5, vocab_size=1000) == first
    assert expected_tokens([1, 2, 3, *first[:2]], 3, vocab_size=1000) == first[2:]
    assert expected_tokens([9, 2, 3], 5, vocab_size=1000) != first
    assert all(0 <= token < 7 for token in expected_tokens([1], 50, vocab_size=7))


def test_chunks_shared_blocks_and_decodes_give_the_expected_tokens():
    runner = create_runner((8, 8))
    prompt = [5, 6, 7, 8, 9, 10]
    chunk = run(runner, ("a", 0, 4), new=[("a", prompt)], blocks={"a": ([3], [1])})
    assert chunk.token_ids == {}
    tokens = run(runner, ("a", 4, 2), blocks={"a": ([0], [7])}).token_ids["a"]
    tokens += run(runner, decodes=["a"]).token_ids["a"]
    assert tokens == expected_tokens(prompt, 2)
    other = [5, 6, 7, 8, 1]
    output = run(runner, ("b", 4, 1), new=[("b", other)], blocks={"b": ([3, 5], [1, 2])})
    assert output.token_ids["b"] == expected_tokens(other, 1)


def started(**settings) -> FakeRunner:
    """Request a, prompt 0 to 5 in blocks 0 and 1, one token generated."""
    runner = create_runner(**settings)
    run(runner, ("a", 0, 6), new=[("a", range(6))], blocks={"a": ([0, 1],)})
    return runner


@pytest.mark.parametrize(
    ("prefills", "new", "blocks", "message"),
    [
        ([("b", 0, 2)], [("b", [1, 2])], {"b": [1]}, "block 1 is written and shared"),
        ([("b", 4, 1)], [("b", [0, 1, 2, 9, 4])], {"b": [0, 2]}, "block 0 .* does not hold"),
        ([("b", 4, 1)], [("b", range(5))], {"b": [5, 2]}, "block 5 .* does not hold"),
        ([("a", 6, 2)], [], {}, "has no tokens up to 8"),
        ([("b", 0, 5)], [("b", range(5))], {"b": [2]}, "the block table is too short"),
        ([("b", 0, 1)], [("b", [1])], {"b": [8]}, "there is no block 8"),
        ([("b", 0, 17)], [("b", range(17))], {"b": [2, 3, 4, 5, 6]}, "more tokens than max_num"),
        ([(i, 0, 1) for i in "bcd"], [(i, [1]) for i in "bcd"], {}, "max_batch_size"),
        ([("a", 6, 1), ("a", 6, 1)], [], {}, "scheduled twice"),
        ([("a", 6, 0)], [], {}, "nothing to compute"),
        ([], [("b", [1])], {"b": [2]}, "new, not computed"),
        ([("a", 0, 1)], [("a", [1])], {}, "a is known already"),
        ([(i, 0, 1) for i in "bc"], [(i, [1]) for i in "bc"], {"b": [2], "c": [2]}, "shared"),
    ],
)
def test_sees_a_scheduler_that_breaks_the_rules(prefills, new, blocks, message):
    with pytest.raises(AssertionError, match=message):
        run(started(), *prefills, new=new, blocks={i: (ids,) for i, ids in blocks.items()})


def test_sees_a_decode_before_the_whole_prompt_is_computed():
    runner = create_runner()
    run(runner, ("a", 0, 4), new=[("a", range(6))], blocks={"a": ([0, 1],)})
    with pytest.raises(AssertionError, match="more to compute first"):
        run(runner, decodes=["a"])


def test_sees_a_block_of_another_prefix():
    # The tokens in the shared block are the right ones; what came before them is not.
    runner = create_runner()
    run(runner, ("a", 0, 8), new=[("a", [9, 9, 9, 9, 5, 6, 7, 8])], blocks={"a": ([0, 1],)})
    run(runner, ("b", 0, 4), new=[("b", [1, 2, 3, 4])], blocks={"b": ([2],)})
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 0]
    with pytest.raises(AssertionError, match="block 1 of KV group 0 does not hold"):
        run(runner, ("c", 8, 1), new=[("c", prompt)], blocks={"c": ([2, 1, 3],)})


def test_sees_that_an_unknown_request_ends():
    with pytest.raises(AssertionError, match="b ends and was never told of"):
        run(started(), finished_request_ids=["b"])


def test_sees_a_second_step_before_the_first_came_back():
    runner = create_runner()
    runner.launch(SchedulerOutput(step_id=0))
    with pytest.raises(AssertionError, match="under way already"):
        runner.launch(SchedulerOutput(step_id=1))


def test_a_forgotten_request_gives_its_blocks_to_others():
    runner = started()
    output = run(
        runner,
        ("b", 0, 5),
        new=[("b", range(5))],
        blocks={"b": ([1, 0],)},
        finished_request_ids=["a"],
    )
    assert output.token_ids["b"] == expected_tokens(range(5), 1)
    assert runner.known_request_ids == {"b"}


# --- guesses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_accepts_guesses_as_far_as_they_are_right_and_one_token_more(num_right):
    runner = started()
    tokens = expected_tokens(range(6), 9)  # the first came with the prompt
    drafts = tokens[1 : 1 + num_right] + [(tokens[1 + num_right] + 1) % 256] * (3 - num_right)
    run_drafts = {"a": ([2],)}
    output = run(runner, decodes=["a"], draft_token_ids={"a": drafts}, blocks=run_drafts)
    assert output.token_ids["a"] == tokens[1 : 2 + num_right]
    rest = run(runner, decodes=["a"]).token_ids["a"]  # over what was rejected
    assert rest == tokens[2 + num_right : 3 + num_right]


def test_guesses_need_room_and_a_decode():
    with pytest.raises(AssertionError, match="the block table is too short"):
        run(started(), decodes=["a"], draft_token_ids={"a": [1, 2]})
    with pytest.raises(AssertionError, match="drafts without a decode"):
        run(started(), draft_token_ids={"a": [1]})


# --- sliding windows ----------------------------------------------------------------------------


def windowed() -> FakeRunner:
    """A prompt of ten tokens; the window of 3 of the second group has passed over two blocks."""
    runner = create_runner((8, 8), windows=(None, 3))
    run(runner, ("a", 0, 10), new=[("a", range(10))], blocks={"a": ([0, 1, 2], [0, 1, 2])})
    return runner


def test_what_the_window_has_passed_may_be_written_by_others():
    runner = windowed()  # token 10 sees the positions 8, 9 and 10
    run(runner, ("b", 0, 4), decodes=["a"], new=[("b", [7] * 4)], blocks={"b": ([3], [1])})
    assert run(runner, decodes=["a"]).token_ids["a"] == expected_tokens(range(10), 3)[2:]


def test_sees_a_block_in_the_window_that_is_given_away():
    with pytest.raises(AssertionError, match="block 2 is written and shared"):
        run(windowed(), ("b", 0, 4), new=[("b", [7] * 4)], blocks={"b": ([3], [2])})


def test_reads_the_window_alone_and_all_of_it():
    # b reuses ten tokens of a; in the windowed group only the block with the tokens 8 and 9.
    prompt = [*range(10), 5]
    blocks = {"b": ([0, 1, 4], [7, 7, 4])}
    copies = ([(2, 4)], [(2, 4)])
    output = run(windowed(), ("b", 10, 1), new=[("b", prompt)], blocks=blocks, block_copies=copies)
    assert output.token_ids["b"] == expected_tokens(prompt, 1)
    with pytest.raises(AssertionError, match="of KV group 1 does not hold"):
        run(
            windowed(),
            ("b", 10, 1),
            new=[("b", prompt)],
            blocks=blocks,
            block_copies=([(2, 4)], []),
        )


# --- block copies -------------------------------------------------------------------------------


def test_all_sources_are_read_before_any_destination_is_written():
    # The tail of a, in block 1, goes to b's block 2, and block 1 itself to c.
    runner = started()
    run(runner, finished_request_ids=["a"])
    output = run(
        runner,
        ("b", 5, 1),
        ("c", 1, 1),
        new=[("b", [0, 1, 2, 3, 4, 9]), ("c", [0, 7])],
        blocks={"b": ([0, 2],), "c": ([1],)},
        block_copies=([(0, 1), (1, 2)],),
    )
    assert output.token_ids == {
        "b": expected_tokens([0, 1, 2, 3, 4, 9], 1),
        "c": expected_tokens([0, 7], 1),
    }


def test_sees_a_copy_onto_a_block_that_others_hold():
    with pytest.raises(AssertionError, match="block 0 is copied to and in 2 tables"):
        run(
            started(),
            ("b", 4, 1),
            new=[("b", range(5))],
            blocks={"b": ([0, 2],)},
            block_copies=([(1, 0)],),
        )


# --- masks, log-probabilities, failures, time ---------------------------------------------------


def mask_of(*token_ids, vocab_size=256):
    bits = np.zeros(vocab_size, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def test_draws_what_the_mask_allows():
    assert run(started(), decodes=["a"], masks={"a": mask_of(63)}).token_ids == {"a": [63]}
    drawn = {
        run(started(), ("b", 0, 1), new=[("b", [i])], blocks={"b": ([2],)}, masks=masks).token_ids[
            "b"
        ][0]
        for i in range(20)
        for masks in [{"b": mask_of(31, 200)}]
    }
    assert drawn == {31, 200}
    assert drawn == {expected_tokens([i], 1, allowed=lambda _: [31, 200])[0] for i in range(20)}
    everything = {"a": mask_of(*range(256))}
    free = run(started(), decodes=["a"]).token_ids
    assert run(started(), decodes=["a"], masks=everything).token_ids == free


def test_prompt_logprobs_of_chunks_are_together_those_of_the_prompt():
    prompt, params = list(range(6)), SamplingParams(prompt_logprobs=2, logprobs=1)
    runner = create_runner()
    first = run(runner, ("a", 0, 4), new=[("a", prompt)], blocks={"a": ([0, 1],)}, params=params)
    second = run(runner, ("a", 4, 2))
    whole = first.prompt_logprobs["a"] + second.prompt_logprobs["a"]
    assert whole == expected_prompt_logprobs(prompt, 2)
    assert len(whole) == 5
    assert len(whole[0].top_token_ids) == 2
    assert not first.logprobs
    assert len(second.logprobs["a"]) == 1
    assert not run(runner, decodes=["a"]).prompt_logprobs


def test_fails_at_the_step_it_is_told():
    runner = create_runner(fail_at_step=1)
    run(runner)
    with pytest.raises(RuntimeError, match="step 1"):
        run(runner)
    run(runner)


def test_fails_the_request_it_is_told():
    runner = create_runner(errors={"a": "as asked"})
    output = run(
        runner,
        ("a", 0, 1),
        ("b", 0, 1),
        new=[("a", [1]), ("b", [2])],
        blocks={"a": ([0],), "b": ([1],)},
    )
    assert output.errors == {"a": "as asked"}
    assert output.token_ids == {"b": expected_tokens([2], 1)}
    # A step that was scheduled before the error was known still computes it.
    assert run(runner, decodes=["a"]).errors == {"a": "as asked"}


@pytest.mark.parametrize("computes", [False, True])
def test_a_step_takes_the_time_it_is_told(computes):
    runner = create_runner(step_s=0.05, step_computes=computes)
    start = time.monotonic()
    run(runner)
    assert time.monotonic() - start >= 0.05
