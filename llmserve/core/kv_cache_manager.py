"""Gives requests their KV cache blocks and finds again what was computed before.

It owns one block pool per KV group and hides them: the scheduler sees token counts, block ids to
pass on, and ``None`` for "full". It knows neither queues nor policies, and it holds no tensors.

The block table of a sequence, with tokens_per_block 4, in half-open token ranges::

    0 ..... 4 ..... 8 ..... 12 .... 16 .... 20 .... 24
    [ reused)[ reused)[  own  )[  own  )[ still to come )
    '------ shared ---'        '- may be partly filled  '--- reserved, not allocated

    [ reused )        full blocks found by ``find_prefix``, held together with others: only read.
    [ own )           allocated by ``start`` and ``grow`` for what a step computes: written by this
                      sequence alone. Once full and computed, ``commit`` makes them findable.
    [ still to come ) counted in ``reserve_tokens``; no block yet, but none is promised twice.

``free`` gives back the whole table at once: at the end of the request, or when it is paused. Blocks
that were committed stay findable until they are evicted. Only full blocks are ever shared and a
full block is never written again, so no copy-on-write is needed.

Each group holds the same number of blocks per sequence: a sliding window is not yet used to give
blocks back early.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from llmserve.core.block_pool import ROOT_KEY, BlockPool, CachedBlock, block_key
from llmserve.core.step import KVGroupSpec

BlockIds = tuple[list[int], ...]  # per KV group


@dataclass(slots=True, eq=False)
class KVSequence:
    """One request's share of the KV cache. The scheduler holds it, the manager alone looks inside.

    Attributes:
        token_ids: Prompt and accepted tokens; the scheduler's own list, which only grows.
        extras: What else the keys of its blocks depend on.
        block_ids: The block table, per KV group.
        keys: Keys of its first full blocks, as far as they were needed yet.
        num_committed_blocks: Blocks that were reused, or offered to the reuse tree already.
        num_reserved_blocks: Blocks per group it may come to hold without asking again.
    """

    token_ids: list[int]
    extras: tuple[str, ...]
    block_ids: BlockIds
    keys: list[bytes] = field(default_factory=list)
    num_committed_blocks: int = 0
    num_reserved_blocks: int = 0


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What of a sequence is in the cache already. Valid until the next allocation.

    Attributes:
        num_tokens: Length of the match, whole blocks.
        block_ids: The blocks, per KV group.
        missing_key: Key of the full block after them, which someone has to compute; None if what
            remains has no reusable full block.
    """

    num_tokens: int
    block_ids: BlockIds
    missing_key: bytes | None


@dataclass(frozen=True, slots=True)
class KVCacheUsage:
    """Blocks, summed over the groups.

    Attributes:
        total: Size of the cache.
        free: Not held by requests, idle ones included.
        idle: Not held by requests but kept for reuse.
    """

    total: int
    free: int
    idle: int


class KVCacheManager:
    """Allocation of KV blocks to sequences, all or nothing, with reuse by prefix.

    Args:
        groups: The model's KV groups.
        num_blocks: Size of each group's pool.
        tokens_per_block: Tokens of one block, the same in every group.
        enable_block_reuse: Keep full blocks after their request and share them by prefix.
        on_stored: Called with (group, block) when a block enters the reuse tree.
        on_removed: Called with (group, block) when one leaves it.
    """

    def __init__(
        self,
        groups: tuple[KVGroupSpec, ...],
        num_blocks: tuple[int, ...],
        tokens_per_block: int,
        enable_block_reuse: bool,
        *,
        on_stored: Callable[[int, CachedBlock], None] | None = None,
        on_removed: Callable[[int, CachedBlock], None] | None = None,
    ) -> None:
        if not groups or len(groups) != len(num_blocks):
            raise ValueError(f"{len(groups)} KV groups, but {len(num_blocks)} pool sizes")
        if min(num_blocks) < 1 or tokens_per_block < 1:
            raise ValueError(
                f"num_blocks {num_blocks}, tokens_per_block {tokens_per_block} below 1"
            )
        self.groups = groups
        self.tokens_per_block = tokens_per_block
        self.enable_block_reuse = enable_block_reuse
        self._pools = tuple(
            BlockPool(
                count,
                on_stored=on_stored and (lambda block, g=group: on_stored(g, block)),
                on_removed=on_removed and (lambda block, g=group: on_removed(g, block)),
            )
            for group, count in enumerate(num_blocks)
        )
        self._sequences: set[KVSequence] = set()  # those that hold blocks or a reservation
        self._reserved_blocks = 0  # per group: promised to sequences, not allocated yet

    @property
    def max_tokens(self) -> int:
        """The longest sequence that fits the empty cache, in tokens."""
        return min(pool.num_blocks for pool in self._pools) * self.tokens_per_block

    def usage(self) -> KVCacheUsage:
        """How full the cache is."""
        return KVCacheUsage(
            total=sum(pool.num_blocks for pool in self._pools),
            free=sum(pool.num_free_blocks for pool in self._pools),
            idle=sum(pool.num_idle_blocks for pool in self._pools),
        )

    def new_sequence(self, token_ids: list[int], cache_salt: str | None) -> KVSequence:
        """A sequence without blocks. ``token_ids`` is kept, not copied, and may only grow."""
        extras = () if cache_salt is None else ("cache_salt", cache_salt)
        return KVSequence(token_ids, extras, self._empty())

    def find_prefix(self, sequence: KVSequence) -> PrefixMatch:
        """Look up the longest cached prefix, in whole blocks. Moves nothing.

        The last token is never part of it: it has to be computed so that there are logits to
        sample from. A block counts only if every group has it.
        """
        limit = (len(sequence.token_ids) - 1) // self.tokens_per_block
        block_ids = self._empty()
        for index in range(limit if self.enable_block_reuse else 0):
            key, tokens, extras = self._content(sequence, index)
            found = [
                pool.find(key, ids[-1] if ids else None, tokens, extras)
                for pool, ids in zip(self._pools, block_ids, strict=True)
            ]
            hits = [block_id for block_id in found if block_id is not None]
            if len(hits) < len(found):
                return PrefixMatch(index * self.tokens_per_block, block_ids, key)
            for ids, block_id in zip(block_ids, hits, strict=True):
                ids.append(block_id)
        return PrefixMatch(len(block_ids[0]) * self.tokens_per_block, block_ids, None)

    def start(
        self, sequence: KVSequence, prefix: PrefixMatch, num_tokens: int, reserve_tokens: int
    ) -> BlockIds | None:
        """Give a sequence its first blocks: the shared ones of ``prefix`` and new ones.

        Args:
            sequence: Holds no blocks yet.
            prefix: What ``find_prefix`` has just found.
            num_tokens: Tokens to have blocks for now, those of ``prefix`` included.
            reserve_tokens: Tokens to keep blocks free for, at least ``num_tokens``.

        Returns:
            The whole block table, or None if the reservation does not fit beside those of the
            others; nothing has moved then. Blocks of ``prefix`` that others hold cost nothing.
        """
        reserved, reused = self._blocks_for(reserve_tokens), len(prefix.block_ids[0])
        for pool, shared in zip(self._pools, prefix.block_ids, strict=True):
            needed = reserved - reused + sum(map(pool.is_idle, shared))
            if needed + self._reserved_blocks > pool.num_free_blocks:
                return None
        self._sequences.add(sequence)
        for pool, ids, shared in zip(
            self._pools, sequence.block_ids, prefix.block_ids, strict=True
        ):
            pool.acquire(shared)
            ids.extend(shared)
        sequence.num_committed_blocks = reused
        sequence.num_reserved_blocks = reserved
        self._reserved_blocks += self._outstanding(sequence)
        self.grow(sequence, num_tokens)
        return tuple(list(ids) for ids in sequence.block_ids)

    def grow(self, sequence: KVSequence, num_tokens: int) -> BlockIds | None:
        """Extend the block table to ``num_tokens`` tokens.

        Returns:
            Per group, the blocks that were appended (often none), or None if there are not enough;
            nothing has moved then. Within the sequence's reservation it never comes to that,
            as long as every sequence keeps within its own.
        """
        count = self._blocks_for(num_tokens) - len(sequence.block_ids[0])
        if count <= 0:
            return self._empty()
        if any(count > pool.num_free_blocks for pool in self._pools):
            return None
        self._reserved_blocks -= self._outstanding(sequence)
        new_block_ids = tuple(pool.allocate(count) for pool in self._pools)
        for ids, new in zip(sequence.block_ids, new_block_ids, strict=True):
            ids.extend(new)
        self._reserved_blocks += self._outstanding(sequence)
        return new_block_ids

    def commit(self, sequence: KVSequence, num_computed_tokens: int) -> None:
        """Make full blocks findable whose KV has been computed for accepted tokens."""
        num_full_blocks = num_computed_tokens // self.tokens_per_block
        if not self.enable_block_reuse or num_full_blocks <= sequence.num_committed_blocks:
            return
        for index in range(sequence.num_committed_blocks, num_full_blocks):
            key, tokens, extras = self._content(sequence, index)
            for pool, ids in zip(self._pools, sequence.block_ids, strict=True):
                parent_id = ids[index - 1] if index else None
                pool.register(CachedBlock(ids[index], parent_id, key, tokens, extras))
        sequence.num_committed_blocks = num_full_blocks

    def free(self, sequence: KVSequence) -> None:
        """Give back all blocks and the reservation of a sequence; nothing to do if it has none."""
        if sequence not in self._sequences:
            return
        self._sequences.remove(sequence)
        self._reserved_blocks -= self._outstanding(sequence)
        for pool, ids in zip(self._pools, sequence.block_ids, strict=True):
            pool.release(ids)
        sequence.block_ids = self._empty()
        sequence.num_committed_blocks = sequence.num_reserved_blocks = 0

    def keys_within(self, sequence: KVSequence, start: int, stop: int) -> list[bytes]:
        """Keys of the full blocks that computing the tokens [start, stop) completes."""
        if not self.enable_block_reuse:
            return []
        blocks = range(start // self.tokens_per_block, stop // self.tokens_per_block)
        return [self._content(sequence, index)[0] for index in blocks]

    def check_integrity(self) -> None:
        """Check that every block is free, idle or held by the sequences known here.

        Raises:
            AssertionError: The books are wrong.
        """
        for group, pool in enumerate(self._pools):
            holders = Counter(i for sequence in self._sequences for i in sequence.block_ids[group])
            pool.check_integrity(holders)
        outstanding = sum(self._outstanding(sequence) for sequence in self._sequences)
        assert self._reserved_blocks == outstanding, "reserved blocks are miscounted"

    def _empty(self) -> BlockIds:
        return tuple([] for _ in self.groups)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tokens_per_block)

    def _outstanding(self, sequence: KVSequence) -> int:
        return max(0, sequence.num_reserved_blocks - len(sequence.block_ids[0]))

    def _content(
        self, sequence: KVSequence, index: int
    ) -> tuple[bytes, tuple[int, ...], tuple[str, ...]]:
        # Key, tokens and extras of a full block. Only the first block carries the extras: the
        # others inherit them through their parent. Keys are computed once per sequence.
        keys, size = sequence.keys, self.tokens_per_block
        while len(keys) <= index:
            tokens = sequence.token_ids[len(keys) * size : (len(keys) + 1) * size]
            keys.append(
                block_key(keys[-1] if keys else ROOT_KEY, tokens, () if keys else sequence.extras)
            )
        tokens_at = tuple(sequence.token_ids[index * size : (index + 1) * size])
        return keys[index], tokens_at, () if index else sequence.extras
