"""Attention over a paged KV cache: requests of one token in batches, longer ones one by one.

A layer's cache is one tensor (num_blocks * tokens_per_block, 2 * kv_heads * head_size): a row, or
*KV slot*, holds K and then V of one token. Slot = block id * tokens_per_block + offset. Slots that
a request has not written hold anything, NaN included, and are never read: where a batch is padded,
the request's own first token stands in and is then masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Queries of a continued prefill that share one mask: bounds the mask, not the result.
_QUERY_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """Requests with one new token each.

    Attributes:
        rows: Their rows in the flat batch.
        kv_slots: int64 (requests * length,): the KV slots of each request's tokens, padded to the
            longest with the slot of its own first token.
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
        num_computed_tokens: Tokens before them, whose KV is in the cache.
        kv_slots: int64 (num_computed_tokens + rows,): the KV slots of all of them, in order.
    """

    rows: slice
    num_computed_tokens: int
    kv_slots: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """How the flat batch of one step attends; the same for every layer.

    Attributes:
        slot_mapping: int64 (tokens,): where each row's K and V go.
        decodes: Rows of single tokens.
        prefills: All other rows.
    """

    slot_mapping: torch.Tensor
    decodes: Sequence[DecodeBatch]
    prefills: Sequence[PrefillChunk]


def paged_attention(
    query: torch.Tensor, key_value: torch.Tensor, cache: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    """Store the step's K and V, then attend causally to all of each request's tokens.

    Args:
        query: (tokens, kv_heads, group, head_size): query heads by the KV head they share.
        key_value: (tokens, 2 * kv_heads * head_size).
        cache: The layer's cache; written.
        plan: Of this step.

    Returns:
        (tokens, kv_heads * group * head_size).
    """
    cache.index_copy_(0, plan.slot_mapping, key_value)
    if len(plan.decodes) == 1 and not plan.prefills:
        return _decode(query, cache, plan.decodes[0]).reshape(query.shape[0], -1)
    out = query.new_empty(query.shape)
    for batch in plan.decodes:
        out[batch.rows] = _decode(query[batch.rows], cache, batch)
    for chunk in plan.prefills:
        out[chunk.rows] = _prefill(query[chunk.rows], cache, chunk)
    return out.view(out.shape[0], -1)


def _decode(query: torch.Tensor, cache: torch.Tensor, batch: DecodeBatch) -> torch.Tensor:
    requests, kv_heads, _, head_size = query.shape
    gathered = cache.index_select(0, batch.kv_slots).view(requests, -1, 2, kv_heads, head_size)
    key, value = gathered.transpose(1, 3).unbind(2)
    # The query heads of a group stand where SDPA expects positions: K and V need no repeating.
    return F.scaled_dot_product_attention(query, key, value, attn_mask=batch.mask)


def _prefill(query: torch.Tensor, cache: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
    tokens, kv_heads, group, head_size = query.shape
    gathered = cache.index_select(0, chunk.kv_slots).view(-1, 2, kv_heads, 1, head_size)
    # KV heads as the batch and their query heads as the heads: K and V are expanded, not copied.
    key, value = gathered.permute(1, 2, 3, 0, 4).expand(2, -1, group, -1, -1).unbind(0)
    heads = query.permute(1, 2, 0, 3)
    before = chunk.num_computed_tokens
    if before == 0:
        out = F.scaled_dot_product_attention(heads, key, value, is_causal=True)
        return out.permute(2, 0, 1, 3)
    parts = []
    for start in range(0, tokens, _QUERY_ROWS):
        stop = min(start + _QUERY_ROWS, tokens)
        mask = causal_mask(before + start, stop - start, query)
        length = before + stop
        parts.append(
            F.scaled_dot_product_attention(
                heads[:, :, start:stop], key[:, :, :length], value[:, :, :length], attn_mask=mask
            )
        )
    return torch.cat(parts, dim=2).permute(2, 0, 1, 3)


def causal_mask(num_before: int, num_tokens: int, like: torch.Tensor) -> torch.Tensor:
    """(num_tokens, num_before + num_tokens): row i sees the first num_before + i + 1 columns."""
    mask = torch.full(
        (num_tokens, num_before + num_tokens), float("-inf"), dtype=like.dtype, device=like.device
    )
    return mask.triu_(num_before + 1)


def attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_computed_tokens: int
) -> torch.Tensor:
    """The definition for one request: a query row and a head at a time, in float64.

    Args:
        query: (tokens, heads, head_size).
        key: (num_computed_tokens + tokens, kv_heads, head_size), in order.
        value: Likewise.
        num_computed_tokens: Tokens before the first query row.

    Returns:
        (tokens, heads, head_size) in float64.
    """
    out = torch.empty(query.shape, dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    for row in range(query.shape[0]):
        visible = num_computed_tokens + row + 1
        for head in range(query.shape[1]):
            keys = key[:visible, head // group].double()
            scores = keys @ query[row, head].double() / query.shape[2] ** 0.5
            out[row, head] = scores.softmax(0) @ value[:visible, head // group].double()
    return out
