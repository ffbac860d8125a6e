"""What the runner remembers of each request, and how one step of them becomes flat tensors.

Every request has a *slot*: a row of the persistent buffers. The tokens live on the device, in
(slots, max_seq_len + 1), so that a sampled token is read by the next step without leaving it. All
index tensors of a step are made here, once, and shared by all layers.

A flat batch holds the decodes first, shortest first, so that those which are gathered together are
neighbours and of similar length; then the prefills, in the order of the schedule.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from llmserve.core.sampling_params import SamplingParams
from llmserve.core.step import NewRequest, ScheduledRequest, SchedulerOutput
from llmserve.runtime.memory import MAX_GATHERED_TOKENS
from llmserve.runtime.torch.kernels.attention import (
    AttentionPlan,
    AttentionView,
    DecodeBatch,
    PrefillChunk,
)

Int64Array = npt.NDArray[np.int64]

# Requests are gathered together while the longest has at most this many times the shortest's
# tokens (and their padded K and V are at most MAX_GATHERED_TOKENS, which bounds the copy's memory).
_MAX_LENGTH_RATIO = 2.0
_SHORT_TOKENS = 64


@dataclass(slots=True, kw_only=True)
class _Request:
    slot: int
    num_tokens: int  # known ones: the prompt, and what was generated
    num_prompt_tokens: int
    num_blocks: int
    sampling_params: SamplingParams
    sequence_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRow:
    """A request that samples in a step.

    Attributes:
        request_id: The request.
        slot: Its row in the token buffer.
        position: Index of the token to draw: the number of those before it.
        num_prompt_tokens: How many of these are the prompt.
        sampling_params: As submitted.
        sequence_index: Part of the key of its random numbers.
    """

    request_id: str
    slot: int
    position: int
    num_prompt_tokens: int
    sampling_params: SamplingParams
    sequence_index: int


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """The rows of a part of a request's prompt in a step: several, or one that samples nothing.

    Attributes:
        request_id: The request.
        rows: Of the flat batch.
    """

    request_id: str
    rows: slice


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """One step, packed.

    Attributes:
        token_ids: int64 (tokens,).
        positions: int64 (tokens,).
        plan: How the tokens attend.
        sampled_rows: int64 (sampled,): rows of the flat batch whose logits are wanted.
        sampled: The requests behind them, in the same order.
        prefills: Parts of prompts.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    plan: AttentionPlan
    sampled_rows: torch.Tensor
    sampled: Sequence[SampledRow]
    prefills: Sequence[PrefillRows]


class InputBatch:
    """The slots of all known requests.

    Args:
        max_batch_size: Number of slots.
        max_seq_len: Tokens of the longest request.
        tokens_per_block: Tokens of one KV block.
        windows: Those of the model's layers, None for layers that see everything.
        dtype: Of activations, and so of masks.
        device: Of the token buffer and of what ``pack`` returns.

    Attributes:
        token_ids: int32 (max_batch_size, max_seq_len + 1) on the device. Only a request's known
            tokens mean anything.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_seq_len: int,
        tokens_per_block: int,
        windows: Collection[int | None],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Never filled: on a CPU, pages that no request reaches take no memory. The one column more
        # takes the token drawn after the last position.
        self.token_ids = torch.empty(
            max_batch_size, max_seq_len + 1, dtype=torch.int32, device=device
        )
        self._tokens_per_block = tokens_per_block
        self._windows = tuple(windows)
        self._dtype, self._device = dtype, device
        max_blocks = -(-max_seq_len // tokens_per_block)
        self._block_tables = np.zeros((max_batch_size, max_blocks), dtype=np.int32)
        self._free_slots = list(range(max_batch_size - 1, -1, -1))
        self._requests: dict[str, _Request] = {}

    def update(self, step: SchedulerOutput) -> None:
        """Forget what has ended, learn what is new, append new blocks to the block tables.

        Raises:
            ValueError: The step asks for what is not implemented.
        """
        for request_id in step.finished_request_ids:
            self._free_slots.append(self._requests.pop(request_id).slot)
        for new in step.new_requests:
            self._add(new)
        for scheduled in step.scheduled:
            if scheduled.draft_token_ids:
                raise ValueError("draft tokens are not implemented")
            (block_ids,) = scheduled.new_block_ids
            if block_ids:
                request = self._requests[scheduled.request_id]
                end = request.num_blocks + len(block_ids)
                self._block_tables[request.slot, request.num_blocks : end] = block_ids
                request.num_blocks = end

    def _add(self, new: NewRequest) -> None:
        if new.request_id in self._requests:
            raise ValueError(f"request {new.request_id} is known already")
        slot = self._free_slots.pop()
        count = len(new.token_ids)
        self.token_ids[slot, :count] = torch.tensor(new.token_ids, dtype=torch.int32)
        self._requests[new.request_id] = _Request(
            slot=slot,
            num_tokens=count,
            num_prompt_tokens=new.num_prompt_tokens,
            num_blocks=0,
            sampling_params=new.sampling_params,
            sequence_index=new.sequence_index,
        )

    def pack(self, scheduled: Sequence[ScheduledRequest]) -> StepInputs:
        """Lay a step out flat.

        Args:
            scheduled: At least one request; all of them known.
        """
        decodes = [request for request in scheduled if request.num_tokens == 1]
        decodes.sort(key=lambda request: request.num_computed_tokens)
        prefills = [request for request in scheduled if request.num_tokens > 1]
        flat = decodes + prefills
        requests = [self._requests[item.request_id] for item in flat]
        slots = np.array([request.slot for request in requests])
        starts = np.array([item.num_computed_tokens for item in flat])
        counts = np.array([item.num_tokens for item in flat])
        ends = np.cumsum(counts)
        row_slots = np.repeat(slots, counts)
        positions = np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)
        sampled = [
            i
            for i, (request, item) in enumerate(zip(requests, flat, strict=True))
            if item.num_computed_tokens + item.num_tokens == request.num_tokens
        ]
        samples = frozenset(sampled)
        token_index = self._to_device(row_slots * self.token_ids.shape[1] + positions)
        return StepInputs(
            token_ids=self.token_ids.view(-1).index_select(0, token_index).long(),
            positions=self._to_device(positions),
            plan=AttentionPlan(
                slot_mapping=self._to_device(self._kv_slots(row_slots, positions)),
                views=self._views(slots, starts, counts, len(decodes)),
            ),
            sampled_rows=self._to_device(ends[sampled] - 1),
            sampled=[self._sampled_row(flat[i].request_id, requests[i]) for i in sampled],
            prefills=[
                PrefillRows(item.request_id, slice(int(ends[i]) - item.num_tokens, int(ends[i])))
                for i, item in enumerate(flat)
                if item.num_tokens > 1 or i not in samples
            ],
        )

    def append_sampled(self, sampled: Sequence[SampledRow], token_ids: torch.Tensor) -> None:
        """Write each sampled token behind its request's known ones.

        Args:
            sampled: Of the step's inputs.
            token_ids: int64 (sampled,) on the device.
        """
        width = self.token_ids.shape[1]
        index = self._to_device(np.array([row.slot * width + row.position for row in sampled]))
        self.token_ids.view(-1).index_copy_(0, index, token_ids.int())
        for row in sampled:
            self._requests[row.request_id].num_tokens += 1

    def _views(
        self, slots: Int64Array, starts: Int64Array, counts: Int64Array, num_decodes: int
    ) -> dict[int | None, AttentionView]:
        longest = int((starts + counts).max())
        built: dict[int, AttentionView] = {}  # by the tokens that are seen at most
        views: dict[int | None, AttentionView] = {}
        for window in self._windows:
            visible = longest if window is None else min(window, longest)
            if visible not in built:
                built[visible] = AttentionView(
                    decodes=list(self._decode_batches(slots, starts + 1, num_decodes, visible)),
                    prefills=list(
                        self._prefill_chunks(slots, starts, counts, num_decodes, visible)
                    ),
                )
            views[window] = built[visible]
        return views

    def _decode_batches(
        self, slots: Int64Array, ends: Int64Array, num_decodes: int, visible: int
    ) -> Iterator[DecodeBatch]:
        lengths = np.minimum(ends, visible)
        start = 0
        for stop in _neighbours(lengths[:num_decodes].tolist()):
            own, longest = lengths[start:stop, None], int(lengths[stop - 1])
            offsets = np.arange(longest)[None, :]
            padding = offsets >= own
            # A padded position reads the first token that is seen: the request's own, and written.
            positions = ends[start:stop, None] - own + np.where(padding, 0, offsets)
            kv_slots = self._kv_slots(slots[start:stop, None], positions)
            yield DecodeBatch(
                rows=slice(start, stop),
                kv_slots=self._to_device(kv_slots.reshape(-1)),
                mask=self._additive_mask(padding) if padding.any() else None,
            )
            start = stop

    def _additive_mask(self, padding: npt.NDArray[np.bool_]) -> torch.Tensor:
        hidden = self._to_device(padding)[:, None, None, :]
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(hidden, float("-inf"))

    def _prefill_chunks(
        self,
        slots: Int64Array,
        starts: Int64Array,
        counts: Int64Array,
        num_decodes: int,
        visible: int,
    ) -> Iterator[PrefillChunk]:
        begin = num_decodes
        for i in range(num_decodes, len(slots)):
            computed, count = int(starts[i]), int(counts[i])
            previous = min(computed, visible - 1)
            positions = np.arange(computed - previous, computed + count)
            yield PrefillChunk(
                rows=slice(begin, begin + count),
                num_previous_tokens=previous,
                kv_slots=self._to_device(self._kv_slots(slots[i], positions)),
            )
            begin += count

    def _kv_slots(self, slots: Int64Array, positions: Int64Array) -> Int64Array:
        blocks, offsets = np.divmod(positions, self._tokens_per_block)
        kv_slots: Int64Array = self._block_tables[slots, blocks] * np.int64(self._tokens_per_block)
        return kv_slots + offsets

    def _sampled_row(self, request_id: str, request: _Request) -> SampledRow:
        return SampledRow(
            request_id=request_id,
            slot=request.slot,
            position=request.num_tokens,
            num_prompt_tokens=request.num_prompt_tokens,
            sampling_params=request.sampling_params,
            sequence_index=request.sequence_index,
        )

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _neighbours(lengths: Sequence[int]) -> Iterator[int]:
    """Cut ascending lengths into batches worth gathering together; yields each batch's end."""
    start = 0
    for i in range(1, len(lengths) + 1):
        if i < len(lengths):
            shortest = max(lengths[start], _SHORT_TOKENS)
            similar = lengths[i] <= shortest * _MAX_LENGTH_RATIO
            if similar and (i + 1 - start) * lengths[i] <= MAX_GATHERED_TOKENS:
                continue
        yield i
        start = i
