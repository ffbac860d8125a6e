"""How a step is laid out flat: rows, positions, KV slots, and which decodes share a gather."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from llmserve.core.sampling_params import SamplingParams
from llmserve.core.step import NewRequest, ScheduledRequest, SchedulerOutput
from llmserve.runtime.torch import input_batch
from llmserve.runtime.torch.input_batch import InputBatch

PROMPTS = {"a": list(range(10, 22)), "b": [50, 51, 52], "c": list(range(70, 77))}


def _part(request_id: str, start: int, count: int, blocks: list[int]) -> ScheduledRequest:
    return ScheduledRequest(
        request_id=request_id, num_computed_tokens=start, num_tokens=count, new_block_ids=(blocks,)
    )


@pytest.fixture
def batch() -> InputBatch:
    """Slots for three requests; 'c' has its first 4 tokens in block 6 already."""
    batch = InputBatch(
        max_batch_size=3,
        max_seq_len=16,
        tokens_per_block=4,
        windows=(None, 3, 12),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    new = [
        NewRequest(
            request_id=name,
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            sampling_params=SamplingParams(seed=0),
        )
        for name, prompt in PROMPTS.items()
    ]
    parts = [_part("a", 0, 8, [1, 0]), _part("b", 0, 2, [3]), _part("c", 4, 1, [6])]
    batch.update(SchedulerOutput(step_id=0, new_requests=new, scheduled=parts))
    return batch


def test_layout(batch: InputBatch) -> None:
    # A chunk of 'a' that is not its last, the last token of 'b' and one of 'c' in its middle.
    parts = [_part("c", 4, 1, [2]), _part("b", 2, 1, []), _part("a", 4, 4, [])]
    batch.update(SchedulerOutput(step_id=1, scheduled=parts))
    inputs = batch.pack(parts)
    # Decodes come first, the shorter one before the longer.
    assert inputs.token_ids.tolist() == [52, 74, 14, 15, 16, 17]
    assert inputs.positions.tolist() == [2, 4, 4, 5, 6, 7]
    assert inputs.plan.slot_mapping.tolist() == [3 * 4 + 2, 2 * 4, 0, 1, 2, 3]
    assert inputs.sampled_rows.tolist() == [0]
    assert [(row.request_id, row.position) for row in inputs.sampled] == [("b", 3)]
    view = inputs.plan.views[None]
    (decode,), (prefill,) = view.decodes, view.prefills
    # 'b' is padded with the slot of its own first token.
    assert decode.kv_slots.view(2, 5).tolist() == [[12, 13, 14, 12, 12], [24, 25, 26, 27, 8]]
    assert decode.mask is not None
    assert decode.mask.isinf().view(2, 5).tolist() == [[False] * 3 + [True] * 2, [False] * 5]
    assert (prefill.rows, prefill.num_previous_tokens) == (slice(2, 6), 4)
    assert prefill.kv_slots.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]


def test_windowed_layers_read_the_last_slots_alone(batch: InputBatch) -> None:
    parts = [_part("c", 4, 1, [2]), _part("b", 1, 1, []), _part("a", 4, 4, [])]
    batch.update(SchedulerOutput(step_id=1, scheduled=parts))
    views = batch.pack(parts).plan.views
    (decode,), (prefill,) = views[3].decodes, views[3].prefills
    # 'b' has two tokens and is padded with its first; of 'c' the positions 2, 3 and 4 are seen.
    assert decode.kv_slots.view(2, 3).tolist() == [[12, 13, 12], [26, 27, 8]]
    assert decode.mask is not None
    assert decode.mask.isinf().view(2, 3).tolist() == [[False, False, True], [False] * 3]
    # The first token of the chunk sees two before it.
    assert (prefill.rows, prefill.num_previous_tokens) == (slice(2, 6), 2)
    assert prefill.kv_slots.tolist() == [6, 7, 0, 1, 2, 3]
    # Nobody has outgrown a window of 12: these layers share what the others read.
    assert views[12] is views[None]


def test_a_sampled_token_is_the_next_input(batch: InputBatch) -> None:
    last = [_part("b", 2, 1, [])]
    batch.append_sampled(batch.pack(last).sampled, torch.tensor([99]))
    inputs = batch.pack([_part("b", 3, 1, [])])
    assert inputs.token_ids.tolist() == [99]
    assert [row.position for row in inputs.sampled] == [4]
    assert inputs.plan.views[None].decodes[0].mask is None


def test_a_request_is_known_once(batch: InputBatch) -> None:
    again = NewRequest(
        request_id="a", token_ids=[1], num_prompt_tokens=1, sampling_params=SamplingParams(seed=0)
    )
    with pytest.raises(ValueError, match="known already"):
        batch.update(SchedulerOutput(step_id=1, new_requests=[again]))


@pytest.mark.parametrize("seed", range(20))
def test_decodes_gathered_together_are_of_similar_length(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_batch, "MAX_GATHERED_TOKENS", 4000)
    rng = random.Random(seed)
    lengths = sorted(int(2 ** rng.uniform(0, 13)) for _ in range(rng.randint(0, 60)))
    ends = list(input_batch._neighbours(lengths))
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
