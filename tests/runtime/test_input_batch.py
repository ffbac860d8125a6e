"""How a step is laid out flat: rows, positions, KV slots, and which decodes share a gather."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from llmserve.core.sampling_params import SamplingParams
from llmserve.core.step import NewRequest, SchedulerOutput
from llmserve.runtime.torch import attention_plan
from llmserve.runtime.torch.attention_plan import GatheredPlanner
from llmserve.runtime.torch.input_batch import InputBatch, StepInputs
from llmserve.runtime.torch.kernels.attention import GatheredView
from tests.runtime.torch_engines import prefill

PROMPTS = {"a": list(range(10, 22)), "b": [50, 51, 52], "c": list(range(70, 77))}


def _new(request_id: str, token_ids: list[int], **params: int) -> NewRequest:
    return NewRequest(
        request_id=request_id,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling_params=SamplingParams(seed=0, **params),
    )


@pytest.fixture
def batch() -> InputBatch:
    """Slots for three requests, and two KV groups: the second has a window of 3."""
    cpu = torch.device("cpu")
    batch = InputBatch(
        max_batch_size=3,
        max_seq_len=16,
        tokens_per_block=4,
        vocab_size=100,
        group_windows=(None, 3),
        layer_windows={None: 0, 3: 1, 99: 0},
        planner=GatheredPlanner(torch.float32, cpu),
        device=cpu,
    )
    step = SchedulerOutput(
        step_id=0,
        new_requests=[_new(name, prompt) for name, prompt in PROMPTS.items()],
        new_block_ids={
            "a": ([1, 0], [7, 8]),
            "b": ([3], [2]),
            "c": ([6], [5]),
        },
    )
    batch.update(step)
    return batch


def _view(inputs: StepInputs, window: int | None) -> GatheredView:
    view = inputs.plan.views[window]
    assert isinstance(view, GatheredView)
    return view


@pytest.fixture
def mixed() -> SchedulerOutput:
    """A chunk of 'a' that is not its last, the newest token of 'b', and one of 'c' in its middle,
    for which it gets a block in each group.
    """
    return SchedulerOutput(
        step_id=1,
        new_block_ids={"c": ([2], [4])},
        decodes=["b"],
        prefills=[prefill("a", 4, 4), prefill("c", 4, 1)],
    )


def test_layout(batch: InputBatch, mixed: SchedulerOutput) -> None:
    batch.update(mixed)
    inputs = batch.pack(mixed)
    # Single rows come first, the shorter request before the longer.
    assert inputs.token_ids.tolist() == [52, 74, 14, 15, 16, 17]
    assert inputs.positions.tolist() == [2, 4, 4, 5, 6, 7]
    assert [(p.request_id, p.rows) for p in inputs.prefills] == [
        ("a", slice(2, 6)),
        ("c", slice(1, 2)),
    ]
    samples = inputs.samples
    assert samples is not None
    assert (samples.request_ids, samples.bounds.tolist()) == (["b"], [0, 1])
    assert (samples.flat_rows.tolist(), samples.rows.positions.tolist()) == ([0], [3])
    view = _view(inputs, None)
    assert view.slot_mapping.tolist() == [3 * 4 + 2, 2 * 4, 0, 1, 2, 3]
    (decode,), (chunk,) = view.decodes, view.prefills
    # 'b' is padded with the slot of its own first token.
    assert decode.kv_slots.view(2, 5).tolist() == [[12, 13, 14, 12, 12], [24, 25, 26, 27, 8]]
    assert decode.mask is not None
    assert decode.mask.isinf().view(2, 5).tolist() == [[False] * 3 + [True] * 2, [False] * 5]
    assert (chunk.rows, chunk.num_previous_tokens) == (slice(2, 6), 4)
    assert chunk.kv_slots.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    # A window that nobody outgrows reads what is read without one.
    assert inputs.plan.views[99] is view


def test_windowed_layers_read_their_own_blocks_and_the_last_slots_alone(
    batch: InputBatch, mixed: SchedulerOutput
) -> None:
    batch.update(mixed)
    view = _view(batch.pack(mixed), 3)
    assert view.slot_mapping.tolist() == [2 * 4 + 2, 4 * 4, 32, 33, 34, 35]
    (decode,), (chunk,) = view.decodes, view.prefills
    # Of 'b' all three are seen; of 'c' the positions 2, 3 and 4.
    assert decode.kv_slots.view(2, 3).tolist() == [[8, 9, 10], [22, 23, 16]]
    assert decode.mask is None
    # The first token of the chunk sees two before it.
    assert (chunk.rows, chunk.num_previous_tokens) == (slice(2, 6), 2)
    assert chunk.kv_slots.tolist() == [30, 31, 32, 33, 34, 35]


def test_sampled_tokens_are_the_next_input(batch: InputBatch) -> None:
    step = SchedulerOutput(step_id=1, decodes=["b"])
    samples = batch.pack(step).samples
    assert samples is not None
    drawn = torch.tensor([99])
    batch.append_sampled(samples.rows, drawn)
    batch.advance(samples, samples.num_accepted(drawn))
    inputs = batch.pack(step)
    assert inputs.token_ids.tolist() == [99]
    assert inputs.positions.tolist() == [3]
    assert inputs.samples is not None
    assert inputs.samples.rows.positions.tolist() == [4]
    assert _view(inputs, None).decodes[0].mask is None


def test_drafts_stand_behind_the_newest_token_and_each_is_sampled_after(batch: InputBatch) -> None:
    step = SchedulerOutput(
        step_id=1,
        new_block_ids={"b": ([9], [9])},
        decodes=["b"],
        draft_token_ids={"b": [60, 61]},
        prefills=[prefill("c", 4, 3)],
    )
    batch.update(step)
    inputs = batch.pack(step)
    assert inputs.token_ids.tolist() == [52, 60, 61, 74, 75, 76]
    assert inputs.positions.tolist() == [2, 3, 4, 4, 5, 6]
    samples = inputs.samples
    assert samples is not None
    assert samples.request_ids == ["b", "c"]
    assert samples.bounds.tolist() == [0, 3, 4]
    assert samples.flat_rows.tolist() == [0, 1, 2, 5]
    assert samples.rows.positions.tolist() == [3, 4, 5, 7]
    assert _view(inputs, None).slot_mapping.tolist()[:3] == [14, 15, 36]
    drawn = torch.tensor([60, 7, 8, 9])
    accepted = samples.num_accepted(drawn)
    assert accepted.tolist() == [2, 1]
    batch.append_sampled(samples.rows, drawn)
    batch.advance(samples, accepted)
    # The newest token of 'b' is now the one that was drawn in place of the second guess.
    inputs = batch.pack(SchedulerOutput(step_id=2, decodes=["c", "b"]))
    assert inputs.token_ids.tolist() == [7, 9]
    assert inputs.positions.tolist() == [4, 7]


@pytest.mark.parametrize("seed", range(5))
def test_guesses_are_accepted_up_to_the_first_wrong_one(batch: InputBatch, seed: int) -> None:
    rng = random.Random(seed)
    guesses = {name: rng.choices((1, 2), k=rng.randint(0, 4)) for name in "abc"}
    step = SchedulerOutput(
        step_id=1,
        decodes=list("abc"),
        draft_token_ids={name: drafts for name, drafts in guesses.items() if drafts},
    )
    samples = batch.pack(step).samples
    assert samples is not None
    drawn = rng.choices((1, 2), k=int(samples.bounds[-1]))
    accepted = samples.num_accepted(torch.tensor(drawn)).tolist()
    for name, start, count in zip(samples.request_ids, samples.bounds, accepted, strict=False):
        expected = 1
        for guess, token in zip(guesses[name], drawn[start:], strict=False):
            if guess != token:
                break
            expected += 1
        assert count == expected


@pytest.mark.parametrize(
    ("start", "count", "wanted"), [(0, 4, 4), (4, 8, 7), (8, 4, 3), (11, 1, 0)]
)
def test_prompt_logprobs_are_of_the_tokens_after_each_row(
    batch: InputBatch, start: int, count: int, wanted: int
) -> None:
    # As after a pause: 12 tokens of the prompt, and two that were generated.
    new = _new("d", [*PROMPTS["a"], 90, 91], prompt_logprobs=2)
    new.num_prompt_tokens = 12
    batch.update(SchedulerOutput(step_id=1, finished_request_ids=["b"], new_requests=[new]))
    step = SchedulerOutput(step_id=2, prefills=[prefill("d", start, count), prefill("a", 0, 4)])
    asking, other = batch.pack(step).prefills
    assert asking.prompt_logprobs == (2 if wanted else None)
    assert asking.next_token_ids.tolist() == PROMPTS["a"][start + 1 : start + 1 + wanted]
    assert (other.prompt_logprobs, len(other.next_token_ids)) == (None, 0)


def test_a_request_is_known_once(batch: InputBatch) -> None:
    with pytest.raises(ValueError, match="known already"):
        batch.update(SchedulerOutput(step_id=1, new_requests=[_new("a", [1])]))


def test_slots_and_block_tables_begin_anew(batch: InputBatch) -> None:
    batch.update(
        SchedulerOutput(
            step_id=1,
            finished_request_ids=["a", "c"],
            new_requests=[_new("a", [1, 2]), _new("d", [3])],
            new_block_ids={"a": ([11], [12]), "d": ([13], [14])},
        )
    )
    inputs = batch.pack(SchedulerOutput(step_id=2, prefills=[prefill("a", 0, 2)], decodes=["d"]))
    assert inputs.token_ids.tolist() == [3, 1, 2]
    assert _view(inputs, None).slot_mapping.tolist() == [52, 44, 45]
    assert _view(inputs, 3).slot_mapping.tolist() == [56, 48, 49]


@pytest.mark.parametrize("seed", range(20))
def test_decodes_gathered_together_are_of_similar_length(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_plan, "MAX_GATHERED_TOKENS", 4000)
    rng = random.Random(seed)
    lengths = sorted(int(2 ** rng.uniform(0, 13)) for _ in range(rng.randint(0, 60)))
    ends = list(attention_plan._neighbours(lengths))
    starts = [0, *ends][: len(ends)]
    batches = [lengths[start:end] for start, end in zip(starts, ends, strict=True)]
    assert [n for batch in batches for n in batch] == lengths
    assert all(batches)
    for batch in batches:
        assert batch[-1] <= 2 * max(batch[0], 64)
        assert len(batch) == 1 or len(batch) * batch[-1] <= 4000
    # None could have been joined with the next one's first.
    for batch, following in itertools.pairwise(batches):
        similar = following[0] <= 2 * max(batch[0], 64)
        assert not similar or (len(batch) + 1) * following[0] > 4000
