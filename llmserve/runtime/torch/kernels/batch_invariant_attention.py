"""Paged attention on a CPU whose every result is the same bits in any batch and any chunk.

Keys are taken in tiles that begin at multiples of KEY_TILE tokens of their request, whoever asks
for them, and queries in tiles whose rows are a number that has been tried. A pair of the two is one
product of scores and one with the values; both add up over as many terms as ever, those that a
query does not see being zeros. What a query gets from its key tiles is added up as a binary tree
over the tiles' own numbers, so that neither later tiles nor those that a window has passed change
the order. The largest score, which all are taken relative to, is exact in any order.

All pairs of a step are batches of products, whatever the requests' lengths. It computes in float32
whatever the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from llmserve.runtime.memory import MAX_INVARIANT_SCORES
from llmserve.runtime.torch.attention_plan import Int64Array, RequestRows
from llmserve.runtime.torch.kernels.attention import AttentionScores
from llmserve.runtime.torch.kernels.batch_invariant import BatchInvariantProducts
from llmserve.runtime.torch.kernels.elementwise import MKL_GRAIN, empty_vectors, softcap_
from llmserve.runtime.torch.kernels.kv_storage import KvStorage

KEY_TILE = 64
# Queries of a request that are one tile: a decode, verified drafts, a prompt.
_QUERY_TILES = (1, 8, 64)
_MIN_PREFILL_TILE = 8

TreeLevel = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePairs:
    """Query tiles of one size, each with the key tiles that it sees.

    Attributes:
        rows: int64 (query_tiles * queries,): rows of the flat batch. What a tile has too few is
            filled up with its last.
        queries: Queries of a tile.
        query_tiles: int64 (pairs,): the query tile of each pair.
        kv_slots: int64 (pairs, KEY_TILE): the KV slots of its keys; in place of those that no query
            of the tile sees, one that is seen.
        mask: float32 (pairs, 1, queries, 1, KEY_TILE): 0, or -inf at what a query does not see.
        levels: How pairs are added up to query tiles: each level's nodes are sums of two nodes of
            the level before, at first pairs, by their indices. Behind the nodes of every level
            stands an empty one.
    """

    rows: torch.Tensor
    queries: int
    query_tiles: torch.Tensor
    kv_slots: torch.Tensor
    mask: torch.Tensor
    levels: Sequence[TreeLevel]


@dataclass(frozen=True, slots=True, kw_only=True)
class InvariantView:
    """What the layers of one window read, in tiles.

    Attributes:
        slot_mapping: int64 (tokens,): where each row's K and V go.
        batches: All rows.
    """

    slot_mapping: torch.Tensor
    batches: Sequence[TilePairs]

    def attend(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        scores: AttentionScores,
        storage: KvStorage,
    ) -> torch.Tensor:
        """Attend batch by batch: see ``AttentionView``."""
        out = torch.empty(query.shape, dtype=query.dtype)
        for pairs in self.batches:
            part = _attend(query.index_select(0, pairs.rows), cache, pairs, scores, storage)
            out.index_copy_(0, pairs.rows, part.to(query.dtype))
        return out


class InvariantPlanner:
    """Plans attention in tiles, on a CPU.

    Args:
        num_heads: Query heads of a layer, which the memory for scores is for.
    """

    def __init__(self, num_heads: int) -> None:
        self._num_heads = num_heads

    def view(self, rows: RequestRows, window: int | None) -> InvariantView:
        """What the layers of a KV group read in tiles: see ``AttentionPlanner``."""
        sizes = self._query_tile_sizes(rows)
        return InvariantView(
            slot_mapping=torch.from_numpy(rows.slot_mapping()),
            batches=[
                batch
                for size in np.unique(sizes).tolist()
                for batch in self._batches(rows, np.flatnonzero(sizes == size), size, window)
            ],
        )

    def _query_tile_sizes(self, rows: RequestRows) -> Int64Array:
        sizes: Int64Array = np.array(_QUERY_TILES)[np.searchsorted(_QUERY_TILES[:-1], rows.counts)]
        # Fewer queries where there are many keys; it changes no bit.
        while (large := self._scores(sizes, rows.ends) > MAX_INVARIANT_SCORES).any():
            smaller = np.maximum(sizes // 2, _MIN_PREFILL_TILE)
            shrunk = np.where(large, np.minimum(sizes, smaller), sizes)
            if (shrunk == sizes).all():
                break
            sizes = shrunk
        return sizes

    def _scores(self, queries: Int64Array | int, keys: Int64Array) -> Int64Array:
        scores: Int64Array = queries * self._num_heads * keys
        return scores

    def _batches(
        self, rows: RequestRows, requests: Int64Array, size: int, window: int | None
    ) -> Iterator[TilePairs]:
        tiles = -(-rows.counts[requests] // size)
        request = np.repeat(requests, tiles)
        first = (np.arange(len(request)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * size
        offsets = np.minimum(first[:, None] + np.arange(size), rows.counts[request][:, None] - 1)
        positions = rows.starts[request][:, None] + offsets
        last = positions[:, -1]
        seen = np.zeros_like(last) if window is None else positions[:, 0] - window + 1
        seen = np.maximum(seen, 0)
        scores = self._scores(size, (last // KEY_TILE - seen // KEY_TILE + 1) * KEY_TILE)
        cuts = np.flatnonzero(np.diff(np.cumsum(scores) // MAX_INVARIANT_SCORES)) + 1
        for tile in np.split(np.arange(len(request)), cuts):
            yield _tile_pairs(
                rows,
                request[tile],
                rows.first_rows[request[tile]][:, None] + offsets[tile],
                positions[tile],
                seen[tile],
                window,
            )


def _tile_pairs(
    rows: RequestRows,
    request: Int64Array,
    flat_rows: Int64Array,
    positions: Int64Array,
    seen: Int64Array,
    window: int | None,
) -> TilePairs:
    """Pair query tiles at ``positions`` (tiles, queries) with key tiles; ``seen``: first keys."""
    last, first_tiles = positions[:, -1], seen // KEY_TILE
    counts = last // KEY_TILE - first_tiles + 1
    query_tiles = np.repeat(np.arange(len(counts)), counts)
    key_tiles = np.arange(len(query_tiles)) + np.repeat(
        first_tiles - np.cumsum(counts) + counts, counts
    )
    keys = key_tiles[:, None] * KEY_TILE + np.arange(KEY_TILE)
    there = np.clip(keys, seen[query_tiles][:, None], last[query_tiles][:, None])
    queries = positions[query_tiles][:, :, None]
    hidden = keys[:, None, :] > queries
    if window is not None:
        hidden |= keys[:, None, :] <= queries - window
    mask = np.where(hidden, np.float32("-inf"), np.float32(0))
    return TilePairs(
        rows=torch.from_numpy(flat_rows.reshape(-1)),
        queries=positions.shape[1],
        query_tiles=torch.from_numpy(query_tiles),
        kv_slots=torch.from_numpy(rows.kv_slots(request[query_tiles][:, None], there)),
        mask=torch.from_numpy(mask)[:, None, :, None, :],
        levels=list(_tree(query_tiles, key_tiles)),
    )


def _tree(query_tiles: Int64Array, key_tiles: Int64Array) -> Iterator[TreeLevel]:
    """The levels over key tiles, ascending in each query tile, until each of these has one node."""
    while len(query_tiles) > query_tiles[-1] + 1:
        key_tiles = key_tiles // 2
        begins = np.ones(len(key_tiles), dtype=np.bool_)
        begins[1:] = (np.diff(key_tiles) != 0) | (np.diff(query_tiles) != 0)
        left, empty = np.flatnonzero(begins), len(key_tiles)
        # A node's second child, if it has two, stands behind its first.
        right = np.where(np.diff(left, append=empty) == 2, left + 1, empty)
        query_tiles, key_tiles = query_tiles[left], key_tiles[left]
        yield _with_empty(left, empty), _with_empty(right, empty)


def _with_empty(nodes: Int64Array, empty: int) -> torch.Tensor:
    return torch.from_numpy(np.append(nodes, empty))


def _attend(
    query: torch.Tensor,
    cache: torch.Tensor,
    pairs: TilePairs,
    scores: AttentionScores,
    storage: KvStorage,
) -> torch.Tensor:
    _, kv_heads, group, head_size = query.shape
    count, queries = len(pairs.query_tiles), pairs.queries
    real = queries * group
    score, weigh = _products(head_size)
    tile = max(score.tile, weigh.tile)
    rows = -(-real // tile) * tile
    key, value = _keys_and_values(cache, pairs.kv_slots, kv_heads, storage)

    # The queries of a KV head are its query heads at each of the tile's positions.
    heads = query.float().mul_(scores.scale).view(-1, queries, kv_heads, group, head_size)
    heads = heads.transpose(1, 2).reshape(-1, kv_heads, real, head_size)
    heads = F.pad(heads, (0, 0, 0, rows - real)).index_select(0, pairs.query_tiles)
    room, weights = empty_vectors(
        count * kv_heads, rows, KEY_TILE, dtype=torch.float32, grain=MKL_GRAIN
    )
    score(heads.flatten(0, 1), key.transpose(1, 2), weights)
    if scores.softcap is not None:
        softcap_(room, scores.softcap)
    weights = weights.view(count, kv_heads, rows, KEY_TILE)
    weights[:, :, :real].view(count, kv_heads, queries, group, KEY_TILE).add_(pairs.mask)
    largest = _over_tiles(weights.amax(-1), pairs.levels, torch.maximum, float("-inf"))
    weights.sub_(largest.index_select(0, pairs.query_tiles).unsqueeze(-1))
    room.exp_()
    products = torch.empty(count, kv_heads, rows, head_size)
    weigh(weights.flatten(0, 1), value, products.flatten(0, 1))
    sums = _over_tiles(weights.sum(-1), pairs.levels, torch.add, 0.0)
    out = _over_tiles(products, pairs.levels, torch.add, 0.0).div_(sums.unsqueeze(-1))
    out = out[:, :, :real].view(-1, kv_heads, queries, group, head_size).transpose(1, 2)
    return out.reshape(-1, kv_heads, group, head_size)


def _keys_and_values(
    cache: torch.Tensor, kv_slots: torch.Tensor, kv_heads: int, storage: KvStorage
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V (pairs * kv_heads, KEY_TILE, head_size) in float32."""
    # Heads of the cache's rows are gathered in the order that the products want them.
    head_size = cache.shape[1] // (2 * kv_heads)
    of_kind = torch.arange(2 * kv_heads).view(2, 1, kv_heads, 1)
    index = (kv_slots * (2 * kv_heads))[None, :, None, :] + of_kind
    rows = storage.load(cache.view(-1, head_size).index_select(0, index.view(-1)))
    key, value = rows.float().view(2, -1, KEY_TILE, head_size).unbind(0)
    return key, value


def _over_tiles(
    pairs: torch.Tensor,
    levels: Sequence[TreeLevel],
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    empty: float,
) -> torch.Tensor:
    """(pairs, ...) -> (query_tiles, ...), combined as a tree whose missing nodes are ``empty``."""
    if not levels:
        return pairs
    nodes = torch.cat((pairs, pairs.new_full((1, *pairs.shape[1:]), empty)))
    for left, right in levels:
        nodes = combine(nodes.index_select(0, left), nodes.index_select(0, right))
    return nodes[:-1]


@cache
def _products(head_size: int) -> tuple[BatchInvariantProducts, BatchInvariantProducts]:
    """Of queries with keys, and of weights with values."""
    return (
        BatchInvariantProducts(head_size, KEY_TILE, transposed=True),
        BatchInvariantProducts(KEY_TILE, head_size, transposed=False),
    )
