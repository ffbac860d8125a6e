"""Attention over a paged KV cache: requests of one token in batches, longer ones one by one.

A layer's cache is one tensor (num_blocks * tokens_per_block, 2 * kv_heads * head_size): a row, or
*KV slot*, holds K and then V of one token. Slot = block id * tokens_per_block + offset. Slots that
a request has not written hold anything, NaN included, and are never read: where a batch is padded,
a token of the request's own stands in and is then masked.

A layer with a sliding window reads the slots that its queries see and no others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from llmserve.runtime.memory import MAX_SCORES, QUERY_ROWS
from llmserve.runtime.torch.kernels.kv_storage import KvStorage

# K and V that are kept in 8 bits are unpacked by so many at a time.
_UNPACKED_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """Requests with one new token each.

    Attributes:
        rows: Their rows in the flat batch.
        kv_slots: int64 (requests * length,): the KV slots of the tokens that each request's new
            one sees, padded to the longest with the first of its own.
        mask: (requests, 1, 1, length): 0, or -inf at the padding; None if nothing is padded.
    """

    rows: slice
    kv_slots: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """Several new tokens of one request.

    Attributes:
        rows: Its rows in the flat batch.
        num_previous_tokens: Tokens before them that any of them sees; their KV is in the cache.
        kv_slots: int64 (num_previous_tokens + rows,): the KV slots of all of them, in order.
    """

    rows: slice
    num_previous_tokens: int
    kv_slots: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionScores:
    """How a layer scores keys.

    Attributes:
        scale: Products of queries and keys are multiplied with it.
        window: Tokens that a query sees, its own included; None for all up to its own.
        softcap: Scores s become softcap * tanh(s / softcap); None leaves them.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


class AttentionView(Protocol):
    """What the layers of one window store and read in a step, and how."""

    @property
    def slot_mapping(self) -> torch.Tensor:
        """int64 (tokens,): where each row's K and V go, in these layers' KV group."""
        ...

    def attend(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        scores: AttentionScores,
        storage: KvStorage,
    ) -> torch.Tensor:
        """Attend causally to what each row's request has in the cache, the step's own included.

        Args:
            query: (tokens, kv_heads, group, head_size): query heads by the KV head they share.
            cache: The layer's cache, written for this step already.
            scores: Of this layer.
            storage: Of this layer.

        Returns:
            As ``query``.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """How the flat batch of one step attends; the same for every layer.

    Attributes:
        views: By window, None for layers that see everything.
    """

    views: Mapping[int | None, AttentionView]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatheredView:
    """K and V are gathered from their slots and given to torch's own attention.

    Attributes:
        slot_mapping: int64 (tokens,): where each row's K and V go.
        decodes: Rows of single tokens.
        prefills: All other rows.
    """

    slot_mapping: torch.Tensor
    decodes: Sequence[DecodeBatch]
    prefills: Sequence[PrefillChunk]

    def attend(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        scores: AttentionScores,
        storage: KvStorage,
    ) -> torch.Tensor:
        """Attend batch by batch and chunk by chunk."""
        if len(self.decodes) == 1 and not self.prefills:
            return _decode(query, cache, self.decodes[0], scores, storage)
        out = query.new_empty(query.shape)
        for batch in self.decodes:
            out[batch.rows] = _decode(query[batch.rows], cache, batch, scores, storage)
        for chunk in self.prefills:
            out[chunk.rows] = _prefill(query[chunk.rows], cache, chunk, scores, storage)
        return out


def whole_sequences_plan(
    lengths: Sequence[int], windows: Collection[int | None], device: torch.device
) -> AttentionPlan:
    """The plan of sequences that are computed whole, one after the other in one flat batch.

    Their KV fills the first sum(lengths) slots of a cache, in order.

    Args:
        lengths: Tokens of each.
        windows: Those of the layers.
        device: Where they are computed.
    """
    slots = torch.arange(sum(lengths), device=device)
    chunks, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        chunks.append(PrefillChunk(rows=rows, num_previous_tokens=0, kv_slots=slots[rows]))
        start += length
    view = GatheredView(slot_mapping=slots, decodes=[], prefills=chunks)
    return AttentionPlan(views=dict.fromkeys(windows, view))


def paged_attention(
    query: torch.Tensor,
    key_value: torch.Tensor,
    cache: torch.Tensor,
    plan: AttentionPlan,
    scores: AttentionScores,
    storage: KvStorage,
) -> torch.Tensor:
    """Store the step's K and V, then attend causally to what each request's tokens see.

    Args:
        query: (tokens, kv_heads, group, head_size): query heads by the KV head they share.
        key_value: (tokens, 2 * kv_heads * head_size).
        cache: The layer's cache; written.
        plan: Of this step.
        scores: Of this layer.
        storage: Of this layer.

    Returns:
        (tokens, kv_heads * group * head_size).
    """
    view = plan.views[scores.window]
    cache.index_copy_(0, view.slot_mapping, storage.store(key_value))
    return view.attend(query, cache, scores, storage).reshape(query.shape[0], -1)


def _gathered(
    cache: torch.Tensor, kv_slots: torch.Tensor, storage: KvStorage, dtype: torch.dtype
) -> torch.Tensor:
    """K and V (slots, 2 * kv_heads * head_size) of some slots in the model's dtype."""
    count, width = kv_slots.shape[0], cache.shape[1]
    size = max(1, _UNPACKED_ELEMENTS // width)
    if cache.dtype == dtype or count <= size:
        return storage.load(cache.index_select(0, kv_slots))
    rows = torch.empty(count, width, dtype=dtype, device=cache.device)
    for part, out in zip(torch.split(kv_slots, size), torch.split(rows, size), strict=True):
        out.copy_(storage.load(cache.index_select(0, part)))
    return rows


def _decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    batch: DecodeBatch,
    scores: AttentionScores,
    storage: KvStorage,
) -> torch.Tensor:
    requests, kv_heads, _, head_size = query.shape
    rows = _gathered(cache, batch.kv_slots, storage, query.dtype)
    key, value = rows.view(requests, -1, 2, kv_heads, head_size).transpose(1, 3).unbind(2)
    # The query heads of a group stand where SDPA expects positions: K and V need no repeating.
    if scores.softcap is not None:
        return _softcapped(query, key, value, batch.mask, scores.scale, scores.softcap)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=batch.mask, scale=scores.scale
    )


def _prefill(
    query: torch.Tensor,
    cache: torch.Tensor,
    chunk: PrefillChunk,
    scores: AttentionScores,
    storage: KvStorage,
) -> torch.Tensor:
    tokens, kv_heads, group, head_size = query.shape
    rows = _gathered(cache, chunk.kv_slots, storage, query.dtype)
    key, value = rows.view(-1, 2, kv_heads, head_size).permute(1, 2, 0, 3).unbind(0)
    heads = query.permute(1, 2, 0, 3)
    before, window, softcap = chunk.num_previous_tokens, scores.window, scores.softcap
    if before == 0 and softcap is None and (window is None or tokens <= window):
        out = _attend(heads, key, value, None, scores.scale)
        return out.permute(2, 0, 1, 3)
    tile = QUERY_ROWS
    if softcap is not None:
        tile = max(1, min(tile, MAX_SCORES // (kv_heads * group * (before + tokens))))
    parts = []
    for start in range(0, tokens, tile):
        stop = min(start + tile, tokens)
        first = 0 if window is None else max(0, before + start + 1 - window)
        mask = causal_mask(before + start - first, stop - start, query, window)
        seen = slice(first, before + stop)
        part = heads[:, :, start:stop], key[:, seen], value[:, seen], mask, scores.scale
        parts.append(_attend(*part) if softcap is None else _attend_softcapped(*part, softcap))
    return torch.cat(parts, dim=2).permute(2, 0, 1, 3)


def _attend(
    heads: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Queries (kv_heads, group, rows, d), keys and values (kv_heads, keys, d), mask (rows, keys).

    Without a mask it is causal.
    """
    # KV heads as the batch and their query heads as the heads: K and V are expanded, not copied.
    shape = (-1, heads.shape[1], -1, -1)
    key, value = key[:, None].expand(shape), value[:, None].expand(shape)
    if key.device.type == "cuda" and key.dtype == torch.float32 and mask is not None:
        # With a mask torch's memory-efficient kernel (2.11, float32 alone) computes the last one of
        # 65, 129, 193, ... queries wrong where keys are expanded.
        key, value = key.contiguous(), value.contiguous()
    return F.scaled_dot_product_attention(
        heads, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
    )


def _attend_softcapped(
    heads: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    # The heads of a group become rows, each with its mask: again nothing of K and V is copied.
    kv_heads, group, rows, _ = heads.shape
    out = _softcapped(heads.flatten(1, 2), key, value, mask.repeat(group, 1), scale, softcap)
    return out.view(kv_heads, group, rows, -1)


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Attention with explicit scores in float32, which SDPA cannot cap."""
    scores = (query @ key.transpose(-1, -2)).float().mul_(scale / softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores = scores.add_(mask)
    return scores.softmax(-1).to(value.dtype) @ value


def causal_mask(
    num_before: int, num_tokens: int, like: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """(num_tokens, num_before + num_tokens) of 0 and -inf, dtype and device as ``like``.

    Row i sees the first num_before + i + 1 columns, or the last ``window`` of these.
    """
    hidden = torch.full(
        (num_tokens, num_before + num_tokens), float("-inf"), dtype=like.dtype, device=like.device
    )
    if window is None:
        return hidden.triu_(num_before + 1)
    return hidden.triu(num_before + 1).add_(hidden.tril(num_before - window))


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_computed_tokens: int,
    scores: AttentionScores,
) -> torch.Tensor:
    """The definition for one request: a query row and a head at a time, in float64.

    Args:
        query: (tokens, heads, head_size).
        key: (num_computed_tokens + tokens, kv_heads, head_size), in order.
        value: Likewise.
        num_computed_tokens: Tokens before the first query row.
        scores: How keys are scored.

    Returns:
        (tokens, heads, head_size) in float64.
    """
    out = torch.empty(query.shape, dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    for row in range(query.shape[0]):
        stop = num_computed_tokens + row + 1
        start = 0 if scores.window is None else max(0, stop - scores.window)
        for head in range(query.shape[1]):
            keys = key[start:stop, head // group].double()
            products = keys @ query[row, head].double() * scores.scale
            if scores.softcap is not None:
                products = scores.softcap * torch.tanh(products / scores.softcap)
            out[row, head] = products.softmax(0) @ value[start:stop, head // group].double()
    return out
