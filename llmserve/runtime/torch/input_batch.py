"""What the runner remembers of each request, and how one step of them becomes flat tensors.

Every request has a *slot*: a row of the persistent buffers. The tokens live on the device, in
(slots, max_seq_len + 1), so that a sampled token is read by the next step without leaving it. All
else is numpy by slot: a step picks its requests' rows at once.

A flat batch holds requests of one row first, shortest first, so that those which are gathered
together are neighbours and of similar length; then decodes with drafts and prefills, in the order
of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from llmserve.core.step import NewRequest, ScheduledPrefill, SchedulerOutput
from llmserve.runtime.torch.attention_plan import (
    AttentionPlanner,
    Int64Array,
    RequestRows,
    to_device,
)
from llmserve.runtime.torch.kernels.attention import AttentionPlan
from llmserve.runtime.torch.sampling_table import NO_LOGPROBS, SampledRows, SamplingTable


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRows:
    """The rows of a prefill.

    Attributes:
        request_id: The request.
        rows: Of the flat batch.
        prompt_logprobs: How many of the likeliest tokens are wanted besides the prompt's own after
            each row; None for no log-probabilities.
        next_token_ids: int64 (n,): the prompt's tokens after the first n rows; empty unless their
            log-probabilities are wanted.
    """

    request_id: str
    rows: slice
    prompt_logprobs: int | None
    next_token_ids: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What a step samples: after one row of a request, or after several with guesses between them.

    Attributes:
        request_ids: The requests.
        bounds: int64 (requests + 1,): request i has the sampled rows [bounds[i], bounds[i + 1]).
        rows: The sampled rows.
        flat_rows: int64 (rows,) on the device: which of the flat batch these are.
        guesses: int64 (rows,): what was guessed that would be drawn, -1 where nothing was; None if
            nowhere.
    """

    request_ids: Sequence[str]
    bounds: Int64Array
    rows: SampledRows
    flat_rows: torch.Tensor
    guesses: Int64Array | None

    def num_accepted(self, token_ids: torch.Tensor) -> Int64Array:
        """How many of its tokens each request keeps: up to the first that is not as guessed.

        Args:
            token_ids: int64 (rows,), drawn; waited for only if there are guesses.

        Returns:
            int64 (requests,), at least 1.
        """
        starts = self.bounds[:-1]
        if self.guesses is None:
            return np.ones(len(starts), dtype=np.int64)
        # Behind its last row nothing was guessed, so every request has one that differs.
        different = np.flatnonzero(self.guesses != token_ids.cpu().numpy())
        accepted: Int64Array = different[np.searchsorted(different, starts)] - starts + 1
        return accepted


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """One step, packed.

    Attributes:
        token_ids: int64 (tokens,).
        positions: int64 (tokens,).
        plan: How the tokens attend.
        prefills: Parts of prompts.
        samples: None if nobody samples.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    plan: AttentionPlan
    prefills: Sequence[PrefillRows]
    samples: Samples | None


class InputBatch:
    """The slots of all known requests.

    Args:
        max_batch_size: Number of slots.
        max_seq_len: Tokens of the longest request.
        tokens_per_block: Tokens of one KV block.
        vocab_size: Tokens that can be drawn.
        group_windows: The window of each KV group, None for full attention.
        layer_windows: The windows that layers have, with the KV group that each belongs to; a
            window that no request outgrows may be in a group without one.
        planner: Makes each group's attention view.
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
        vocab_size: int,
        group_windows: Sequence[int | None],
        layer_windows: Mapping[int | None, int],
        planner: AttentionPlanner,
        device: torch.device,
    ) -> None:
        # Never filled: on a CPU, pages that no request reaches take no memory. The one column more
        # takes the token drawn after the last position.
        self.token_ids = torch.empty(
            max_batch_size, max_seq_len + 1, dtype=torch.int32, device=device
        )
        self._tokens_per_block = tokens_per_block
        self._group_windows, self._layer_windows = tuple(group_windows), dict(layer_windows)
        self._planner, self._device = planner, device
        max_blocks = -(-max_seq_len // tokens_per_block)
        self._block_tables = [
            np.zeros((max_batch_size, max_blocks), dtype=np.int32) for _ in group_windows
        ]
        self._num_blocks = np.zeros((len(group_windows), max_batch_size), dtype=np.int64)
        self._num_tokens = np.zeros(max_batch_size, dtype=np.int64)  # known: prompt and answer
        self._sampling = SamplingTable(max_batch_size, vocab_size)
        self._slots: dict[str, int] = {}
        self._free_slots = list(range(max_batch_size - 1, -1, -1))

    def update(self, step: SchedulerOutput) -> None:
        """Forget what has ended, learn what is new, append new blocks to the block tables.

        Raises:
            ValueError: A new request is known already, or its seed is None and it is sampled.
        """
        for request_id in step.finished_request_ids:
            self._free_slots.append(self._slots.pop(request_id))
        for new in step.new_requests:
            self._learn(new)
        for request_id, block_ids in step.new_block_ids.items():
            slot = self._slots[request_id]
            for group, appended in enumerate(block_ids):
                start = self._num_blocks[group, slot]
                end = start + len(appended)
                self._block_tables[group][slot, start:end] = appended
                self._num_blocks[group, slot] = end

    def _learn(self, new: NewRequest) -> None:
        if new.request_id in self._slots:
            raise ValueError(f"request {new.request_id} is known already")
        self._slots[new.request_id] = slot = self._free_slots.pop()
        count = len(new.token_ids)
        self.token_ids[slot, :count] = torch.tensor(new.token_ids, dtype=torch.int32)
        self._num_tokens[slot] = count
        self._num_blocks[:, slot] = 0
        self._sampling.learn(slot, new)

    def pack(self, step: SchedulerOutput) -> StepInputs:
        """Lay a step out flat, once ``update`` has taken in what is new in it.

        Args:
            step: With at least one request that computes something.
        """
        if step.draft_token_ids:
            self._write_drafts(step.draft_token_ids)
        request_ids, rows = self._flat_batch(step)
        slots, positions = np.repeat(rows.slots, rows.counts), rows.positions()
        views = [
            self._planner.view(replace(rows, block_tables=tables), window)
            for tables, window in zip(self._block_tables, self._group_windows, strict=True)
        ]
        token_index = self._token_index(slots, positions)
        return StepInputs(
            token_ids=self.token_ids.view(-1).index_select(0, token_index).long(),
            positions=to_device(positions, self._device),
            plan=AttentionPlan(
                views={window: views[group] for window, group in self._layer_windows.items()}
            ),
            prefills=self._prefills(step.prefills, request_ids, rows),
            samples=self._samples(step.draft_token_ids, request_ids, rows, slots, positions),
        )

    def append_sampled(self, rows: SampledRows, token_ids: torch.Tensor) -> None:
        """Write what was drawn, int64 (rows,), where it belongs, behind accepted tokens or not."""
        index = self._token_index(rows.slots, rows.positions)
        self.token_ids.view(-1).index_copy_(0, index, token_ids.int())

    def advance(self, samples: Samples, num_accepted: Int64Array) -> None:
        """Know so many tokens more of each request that sampled."""
        self._num_tokens[samples.rows.slots[samples.bounds[:-1]]] += num_accepted

    def _flat_batch(self, step: SchedulerOutput) -> tuple[list[str], RequestRows]:
        """The requests in the order of the flat batch, and their rows in it."""
        request_ids = [*step.decodes, *(prefill.request_id for prefill in step.prefills)]
        slots = np.array([self._slots[request_id] for request_id in request_ids], dtype=np.int64)
        starts, counts = self._num_tokens[slots] - 1, np.ones_like(slots)
        num_decodes = len(step.decodes)
        starts[num_decodes:] = [prefill.num_computed_tokens for prefill in step.prefills]
        counts[num_decodes:] = [prefill.num_tokens for prefill in step.prefills]
        if drafts := step.draft_token_ids:
            counts[:num_decodes] += [len(drafts.get(i, ())) for i in step.decodes]
        several = counts > 1
        order = np.lexsort((np.where(several, 0, starts), several))
        counts = counts[order]
        rows = RequestRows(
            starts=starts[order],
            counts=counts,
            first_rows=np.cumsum(counts) - counts,
            slots=slots[order],
            block_tables=self._block_tables[0],
            tokens_per_block=self._tokens_per_block,
        )
        return [request_ids[i] for i in order.tolist()], rows

    def _write_drafts(self, draft_token_ids: Mapping[str, Sequence[int]]) -> None:
        counts = [len(drafts) for drafts in draft_token_ids.values()]
        slots = np.array([self._slots[request_id] for request_id in draft_token_ids])
        known = np.repeat(self._num_tokens[slots], counts)
        offsets = np.concatenate([np.arange(count) for count in counts])
        index = self._token_index(np.repeat(slots, counts), known + offsets)
        drafts = np.concatenate(list(draft_token_ids.values())).astype(np.int32)
        self.token_ids.view(-1).index_copy_(0, index, to_device(drafts, self._device))

    def _prefills(
        self, prefills: Sequence[ScheduledPrefill], request_ids: Sequence[str], rows: RequestRows
    ) -> list[PrefillRows]:
        if not prefills:
            return []
        places = {request_id: i for i, request_id in enumerate(request_ids)}
        return [
            self._prefill_rows(prefill, rows, places[prefill.request_id]) for prefill in prefills
        ]

    def _prefill_rows(
        self, prefill: ScheduledPrefill, rows: RequestRows, place: int
    ) -> PrefillRows:
        first, slot = int(rows.first_rows[place]), int(rows.slots[place])
        start = prefill.num_computed_tokens
        wanted, num_prompt_tokens = self._sampling.prompt_logprobs(slot)
        # The last row's next token is drawn, unless there is more of the prompt to come.
        stop = min(start + prefill.num_tokens, num_prompt_tokens - 1)
        asks = wanted != NO_LOGPROBS and stop > start
        return PrefillRows(
            request_id=prefill.request_id,
            rows=slice(first, first + prefill.num_tokens),
            prompt_logprobs=wanted if asks else None,
            next_token_ids=self.token_ids[slot, start + 1 : stop + 1 if asks else start + 1].long(),
        )

    def _samples(
        self,
        draft_token_ids: Mapping[str, Sequence[int]],
        request_ids: Sequence[str],
        rows: RequestRows,
        slots: Int64Array,
        positions: Int64Array,
    ) -> Samples | None:
        # What is drawn follows the newest known token, or a draft behind it.
        known = self._num_tokens[rows.slots]
        counts = np.maximum(rows.starts + rows.counts - known + 1, 0)
        sampling = np.flatnonzero(counts)
        if not len(sampling):
            return None
        flat_rows = np.flatnonzero(positions >= np.repeat(known, rows.counts) - 1)
        sampled_ids = [request_ids[i] for i in sampling.tolist()]
        bounds = np.concatenate(([0], np.cumsum(counts[sampling])))
        guesses = None
        if draft_token_ids:
            guesses = np.full(len(flat_rows), -1)
            for request_id, start in zip(sampled_ids, bounds.tolist(), strict=False):
                drafts = draft_token_ids.get(request_id, ())
                guesses[start : start + len(drafts)] = drafts
        return Samples(
            request_ids=sampled_ids,
            bounds=bounds,
            rows=self._sampling.rows(slots[flat_rows], positions[flat_rows] + 1),
            flat_rows=to_device(flat_rows, self._device),
            guesses=guesses,
        )

    def _token_index(self, slots: Int64Array, positions: Int64Array) -> torch.Tensor:
        return to_device(slots * self.token_ids.shape[1] + positions, self._device)
