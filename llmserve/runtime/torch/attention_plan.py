"""How the flat batch of a step attends: from rows of requests to what the attention kernels read.

Planning is numpy on the host, once for each KV group and shared by its layers. It knows tokens'
places in the KV cache, and neither K and V nor what a layer does with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from llmserve.runtime.memory import MAX_GATHERED_TOKENS
from llmserve.runtime.torch.kernels.attention import (
    AttentionView,
    DecodeBatch,
    GatheredView,
    PrefillChunk,
)

Int64Array = npt.NDArray[np.int64]

# Requests are gathered together while the longest has at most this many times the shortest's
# tokens (and their padded K and V are at most MAX_GATHERED_TOKENS, which bounds the copy's memory).
_MAX_LENGTH_RATIO = 2.0
_SHORT_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRows:
    """The flat batch of a step by request, with the block tables of one KV group.

    Requests of one row come first, by ascending position; then all others, each with its rows side
    by side and in order.

    Attributes:
        starts: int64 (requests,): position of each one's first row.
        counts: int64 (requests,): rows, at least one each.
        first_rows: int64 (requests,): where they begin in the flat batch.
        slots: int64 (requests,): rows of the block tables.
        block_tables: int32 (slots, blocks): ids of the blocks that hold each slot's tokens.
        tokens_per_block: Tokens of one block.
    """

    starts: Int64Array
    counts: Int64Array
    first_rows: Int64Array
    slots: Int64Array
    block_tables: npt.NDArray[np.int32]
    tokens_per_block: int

    @property
    def ends(self) -> Int64Array:
        """int64 (requests,): the position behind each one's last row."""
        return self.starts + self.counts

    def kv_slots(self, requests: Int64Array | int, positions: Int64Array) -> Int64Array:
        """Where tokens are in the caches of the group's layers.

        Args:
            requests: Indices of requests in the flat batch; broadcast with ``positions``.
            positions: Of tokens in their request, each before the request's end.

        Returns:
            int64, in their common shape: KV slots.
        """
        blocks, offsets = np.divmod(positions, self.tokens_per_block)
        kv_slots: Int64Array = self.block_tables[self.slots[requests], blocks] * np.int64(
            self.tokens_per_block
        )
        return kv_slots + offsets

    def slot_mapping(self) -> Int64Array:
        """int64 (rows,): the KV slot of each row's own token."""
        requests = np.repeat(np.arange(len(self.counts)), self.counts)
        return self.kv_slots(requests, self.positions())

    def positions(self) -> Int64Array:
        """int64 (rows,): the position of each row in its request."""
        first: Int64Array = np.repeat(self.starts - self.first_rows, self.counts)
        return np.arange(len(first)) + first


class AttentionPlanner(Protocol):
    """Decides how the rows of a step attend."""

    def view(self, rows: RequestRows, window: int | None) -> AttentionView:
        """What the layers of a KV group read in a step.

        Args:
            rows: The step, with the group's block tables.
            window: Tokens that a query of the group sees, its own included; None for all.

        Returns:
            On the planner's device. It reads no slot of a token that no row sees.
        """
        ...


class GatheredPlanner:
    """Single rows in batches of similar length, all others by request.

    Args:
        dtype: Of activations, and so of masks.
        device: Of what is planned.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device

    def view(self, rows: RequestRows, window: int | None) -> GatheredView:
        """What the layers of a KV group gather: see ``AttentionPlanner``."""
        num_single = int(np.searchsorted(rows.counts > 1, True))
        return GatheredView(
            slot_mapping=to_device(rows.slot_mapping(), self._device),
            decodes=list(self._decode_batches(rows, num_single, window)),
            prefills=list(self._prefill_chunks(rows, num_single, window)),
        )

    def _decode_batches(
        self, rows: RequestRows, num_single: int, window: int | None
    ) -> Iterator[DecodeBatch]:
        ends = rows.ends[:num_single]
        lengths = ends if window is None else np.minimum(ends, window)
        start = 0
        for stop in _neighbours(lengths.tolist()):
            own, longest = lengths[start:stop, None], int(lengths[stop - 1])
            offsets = np.arange(longest)[None, :]
            padding = offsets >= own
            # A padded position reads the first token that is seen: the request's own, and written.
            positions = ends[start:stop, None] - own + np.where(padding, 0, offsets)
            kv_slots = rows.kv_slots(np.arange(start, stop)[:, None], positions)
            yield DecodeBatch(
                rows=slice(start, stop),
                kv_slots=to_device(kv_slots.reshape(-1), self._device),
                mask=self._additive_mask(padding) if padding.any() else None,
            )
            start = stop

    def _additive_mask(self, padding: npt.NDArray[np.bool_]) -> torch.Tensor:
        hidden = to_device(padding, self._device)[:, None, None, :]
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(hidden, float("-inf"))

    def _prefill_chunks(
        self, rows: RequestRows, num_single: int, window: int | None
    ) -> Iterator[PrefillChunk]:
        for request in range(num_single, len(rows.counts)):
            start, count = int(rows.starts[request]), int(rows.counts[request])
            first_row = int(rows.first_rows[request])
            previous = start if window is None else min(start, window - 1)
            positions = np.arange(start - previous, start + count)
            yield PrefillChunk(
                rows=slice(first_row, first_row + count),
                num_previous_tokens=previous,
                kv_slots=to_device(rows.kv_slots(request, positions), self._device),
            )


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """An array as a tensor on a device; on a CPU they share memory, and a GPU is not waited for."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


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
