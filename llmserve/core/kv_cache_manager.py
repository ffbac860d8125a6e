"""Gives requests their KV cache blocks and finds again what was computed before.

It owns a block pool per KV group and one tree of prefixes over all of them, and hides both: the
scheduler sees token counts, block ids to pass on, and ``None`` for "full". It knows neither queues
nor policies, and it holds no tensors.

The block table of a sequence, with tokens_per_block 4, in half-open token ranges::

    0 ..... 4 ..... 8 ..... 12 .... 16 .... 20 .... 24
    [passed )[ reused)[ copy )[  own  )[ still to come )
             '----- held by the sequence -----'  '- reserved, not allocated

    [ passed )        of a sliding-window group alone: no later token sees it. Given back by
                      ``grow``, and its place in the table means nothing.
    [ reused )        full blocks found by ``find_prefix``, held together with others: only read.
    [ copy )          its own block, into which the runner copies the beginning of one that was
                      found: as many first tokens as they have in common. The rest it computes.
    [ own )           allocated by ``start`` and ``grow`` for what a step computes: written by this
                      sequence alone. ``commit`` makes computed ones findable, the last partly
                      filled one included: what stands in its beginning is not written again.
    [ still to come ) counted in ``reserve_tokens``; no block yet, but none is promised twice.

``free`` gives back the whole table at once: at the end of the request, or when it is paused. Blocks
that were committed stay findable until they are evicted: by retention priority, lower first, then
the least recently used. In a group of full attention whoever holds a block holds all before it, for
no less a priority, and gives them back later: so the next to go is always a leaf. In a group with a
window a block is of use without those before it, and goes by its own age.

Rolling back is safe. Tokens that are not accepted are never committed, and lie behind all that are;
the next step writes over them in blocks that stay in the table.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest

from llmserve.core.block_pool import BlockPool
from llmserve.core.prefix_tree import ROOT_KEY, PrefixNode, PrefixTree, block_key
from llmserve.core.request import DEFAULT_RETENTION_PRIORITY
from llmserve.core.step import BlockIds, KVGroupSpec

NodeListener = Callable[[int, PrefixNode], None]


def num_window_blocks(window: int, num_step_tokens: int, tokens_per_block: int) -> int:
    """Most blocks that the tokens of one step and the windows before them can touch.

    Together they are ``window - 1 + num_step_tokens`` positions, which may begin anywhere in a
    block.
    """
    return (window + num_step_tokens - 3) // tokens_per_block + 2


def max_sequence_blocks(
    num_tokens: int, window: int | None, *, max_step_tokens: int, tokens_per_block: int
) -> int:
    """Most blocks of one KV group that a sequence of so many tokens ever holds.

    Args:
        num_tokens: Its length at the end.
        window: Of the group; None for full attention.
        max_step_tokens: Most tokens computed in one step.
        tokens_per_block: Tokens of one block.
    """
    all_blocks = -(-num_tokens // tokens_per_block)
    if window is None:
        return all_blocks
    return min(all_blocks, num_window_blocks(window, max_step_tokens, tokens_per_block))


@dataclass(slots=True, eq=False)
class KVSequence:
    """One request's share of the KV cache. The scheduler holds it, the manager alone looks inside.

    Attributes:
        token_ids: Prompt and accepted tokens; the scheduler's own list, which only grows.
        extras: What else the keys of its blocks depend on.
        retention_priority: Of its blocks once nobody holds them, 0 to 100.
        num_block_tokens: Tokens its block tables have room for, in every group.
        block_ids: The block table, per KV group.
        num_passed_blocks: Per group, how many first entries it holds no more.
        num_shared_blocks: How many first entries of the table it shares; the others it allocated.
        num_reserved_blocks: Per group, how many blocks of its own it may come to hold at a time.
        chunks: Tokens of its first full blocks, as far as they were needed yet.
        keys: Their keys, likewise.
        num_committed_tokens: Tokens whose blocks were found, or offered to the tree already.
        node: The last full one of them in the tree; None before the first.
        tail: Its own partly filled block in the tree.
        owns_path: Whether the blocks of ``node`` and those before it, in groups of full attention,
            are those of its table.
        private: Whether what it computes from here on stays out of the tree.
    """

    token_ids: list[int]
    extras: tuple[str, ...]
    retention_priority: int
    block_ids: BlockIds
    num_passed_blocks: list[int]
    num_reserved_blocks: list[int]
    num_block_tokens: int = 0
    num_shared_blocks: int = 0
    chunks: list[tuple[int, ...]] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_committed_tokens: int = 0
    node: PrefixNode | None = None
    tail: PrefixNode | None = None
    owns_path: bool = True
    private: bool = False

    def reset(self) -> None:
        """It holds nothing any more, and can start anew."""
        self.block_ids = tuple([] for _ in self.block_ids)
        self.num_passed_blocks = [0] * len(self.block_ids)
        self.num_reserved_blocks = [0] * len(self.block_ids)
        self.num_block_tokens = self.num_shared_blocks = self.num_committed_tokens = 0
        self.node = self.tail = None
        self.owns_path, self.private = True, False


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixMatch:
    """What of a sequence is in the cache already. Valid until the cache is touched again.

    Attributes:
        num_tokens: Length of the match; no multiple of a block where its end is to be copied.
        missing_key: Key of the first full block that is missing and that computing the sequence's
            tokens completes; None if there is none.
        num_reused_blocks: Blocks that are shared or copied from, over all groups.
        num_missed_blocks: Full blocks of the sequence that are neither, over all groups.
        nodes: Full blocks of the match.
        source: The block whose beginning is to be copied behind them.
    """

    num_tokens: int = 0
    missing_key: bytes | None = None
    num_reused_blocks: int = 0
    num_missed_blocks: int = 0
    nodes: list[PrefixNode] = field(default_factory=list)
    source: PrefixNode | None = None


@dataclass(frozen=True, slots=True)
class StartedSequence:
    """Attributes:
    block_ids: The whole block table, per KV group.
    block_copies: Per KV group, (src, dst) to copy before the step computes.
    """

    block_ids: BlockIds
    block_copies: tuple[list[tuple[int, int]], ...]


@dataclass(frozen=True, slots=True)
class KVCacheUsage:
    """Blocks, summed over the groups.

    Attributes:
        total: Size of the cache.
        free: Not held by requests, idle ones included.
        idle: Not held by requests but kept for reuse.
        allocated: Counter of blocks handed out for writing.
        shared: Counter of blocks handed out to be read, for they were found.
    """

    total: int
    free: int
    idle: int
    allocated: int
    shared: int


class _Group:
    """One KV group's pool, and what its window makes of it."""

    def __init__(
        self,
        index: int,
        window: int | None,
        pool: BlockPool,
        tokens_per_block: int,
        max_step_tokens: int,
    ) -> None:
        self.index = index
        self.window = window
        self.pool = pool
        self.tokens_per_block = tokens_per_block
        self.max_step_tokens = max_step_tokens
        self.num_promised_blocks = 0  # the sum of ``outstanding`` over the sequences

    def max_blocks(self, num_tokens: int) -> int:
        return max_sequence_blocks(
            num_tokens,
            self.window,
            max_step_tokens=self.max_step_tokens,
            tokens_per_block=self.tokens_per_block,
        )

    def first_block(self, position: int) -> int:
        # The first block that the token at this position sees.
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // self.tokens_per_block

    def max_own_blocks(self, num_tokens: int, num_shared: int) -> int:
        # Blocks that a sequence allocates for itself, at a time, if its first ones are shared.
        return min(
            -(-num_tokens // self.tokens_per_block) - num_shared, self.max_blocks(num_tokens)
        )

    def outstanding(self, num_reserved: int, num_own: int) -> int:
        # What counts as promised for a sequence that has allocated so many of what it reserved. One
        # with a window may give back what it has and come again, so all of it stays promised.
        return num_reserved if self.window is not None else max(0, num_reserved - num_own)

    def fits(self, shared: list[int], num_new: int, num_reserved: int, num_most: int) -> bool:
        # Whether these can be shared, so many allocated at once, and so many promised in all; the
        # sequence never holds more than ``num_most``.
        pool = self.pool
        num_idle = sum(pool.num_holders(block_id) == 0 for block_id in shared)
        num_free = pool.num_free_blocks - num_idle
        if self.window is None:
            return self.num_promised_blocks + num_reserved <= num_free
        if self.num_promised_blocks == 0:
            return num_new <= num_free and num_most <= pool.num_blocks
        # Who allocated a shared block may pass it before the others do, and needs another then: it
        # is counted beside all that anyone may allocate.
        num_shared = pool.num_shared_blocks + sum(not pool.is_shared(i) for i in shared)
        num_promised = self.num_promised_blocks + num_reserved
        return num_new <= num_free and num_promised + num_shared <= pool.num_blocks


def _is_covered(tail: PrefixNode) -> bool:
    # Whether another block begins with the same tokens.
    assert tail.parent is not None
    _, num_common = tail.parent.longest_beginning(tail.token_ids, besides=tail)
    return num_common == len(tail.token_ids)


class KVCacheManager:
    """Allocation of KV blocks to sequences, all or nothing, with reuse by prefix.

    Args:
        groups: The model's KV groups.
        num_blocks: Size of each group's pool.
        tokens_per_block: Tokens of one block, the same in every group.
        max_step_tokens: Most tokens computed in one step.
        enable_block_reuse: Keep blocks after their request and share them by prefix.
        enable_partial_reuse: Copy the beginning of a block where no more of it matches.
        on_stored: Called with (group, node) when a full block enters the tree of prefixes.
        on_removed: Called with (group, node) when one leaves it.
    """

    def __init__(
        self,
        groups: tuple[KVGroupSpec, ...],
        num_blocks: tuple[int, ...],
        tokens_per_block: int,
        *,
        max_step_tokens: int,
        enable_block_reuse: bool = True,
        enable_partial_reuse: bool = True,
        on_stored: NodeListener | None = None,
        on_removed: NodeListener | None = None,
    ) -> None:
        if not groups or len(groups) != len(num_blocks):
            raise ValueError(f"{len(groups)} KV groups, but {len(num_blocks)} pool sizes")
        if min(*num_blocks, tokens_per_block, max_step_tokens) < 1:
            raise ValueError(
                f"num_blocks {num_blocks}, tokens_per_block {tokens_per_block} or max_step_tokens "
                f"{max_step_tokens} below 1"
            )
        self.groups = groups
        self.tokens_per_block = tokens_per_block
        self.enable_block_reuse = enable_block_reuse
        self.enable_partial_reuse = enable_partial_reuse
        self._on_stored = on_stored
        self._on_removed = on_removed
        self._groups = tuple(
            _Group(
                index,
                spec.window,
                BlockPool(count, partial(self._evict, index)),
                tokens_per_block,
                max_step_tokens,
            )
            for index, (spec, count) in enumerate(zip(groups, num_blocks, strict=True))
        )
        self._full = [group for group in self._groups if group.window is None]
        self._windowed = [group for group in self._groups if group.window is not None]
        self._tree = PrefixTree(len(groups))
        self._num_allocated_blocks = self._num_shared_blocks = 0
        self._sequences: set[KVSequence] = set()  # those that were started and not freed

    @property
    def max_tokens(self) -> int:
        """The longest sequence that fits the empty cache, in tokens."""
        return min(
            sys.maxsize
            if group.max_blocks(sys.maxsize) <= group.pool.num_blocks
            else group.pool.num_blocks * self.tokens_per_block
            for group in self._groups
        )

    def usage(self) -> KVCacheUsage:
        """How full the cache is."""
        pools = [group.pool for group in self._groups]
        return KVCacheUsage(
            total=sum(pool.num_blocks for pool in pools),
            free=sum(pool.num_free_blocks for pool in pools),
            idle=sum(pool.num_idle_blocks for pool in pools),
            allocated=self._num_allocated_blocks,
            shared=self._num_shared_blocks,
        )

    def new_sequence(
        self,
        token_ids: list[int],
        cache_salt: str | None,
        retention_priority: int = DEFAULT_RETENTION_PRIORITY,
    ) -> KVSequence:
        """A sequence without blocks. ``token_ids`` is kept, not copied, and may only grow."""
        extras = () if cache_salt is None else ("cache_salt", cache_salt)
        none = [0] * len(self.groups)
        return KVSequence(
            token_ids, extras, retention_priority, self._empty(), list(none), list(none)
        )

    def find_prefix(self, sequence: KVSequence, *, reuse: bool = True) -> PrefixMatch:
        """Look up the longest cached prefix: whole blocks, and the beginning of one more.

        It counts if every group of full attention has all its blocks, and every group with a window
        those that the window before its end needs. The last token is never part of it: it has to be
        computed so that there are logits to sample from.

        Args:
            sequence: Holds no blocks.
            reuse: False finds nothing.
        """
        size, num_groups = self.tokens_per_block, len(self.groups)
        num_full = len(sequence.token_ids) // size
        if not (reuse and self.enable_block_reuse):
            return PrefixMatch(num_missed_blocks=num_full * num_groups)
        limit = len(sequence.token_ids) - 1
        nodes = self._cached_nodes(sequence, limit // size)
        num_tokens, source = len(nodes) * size, None
        if self.enable_partial_reuse:
            last = nodes[-1] if nodes else self._tree.root(sequence.extras)
            following = sequence.token_ids[num_tokens : min(limit, num_tokens + size)]
            source, num_common = last.longest_beginning(following)
            num_tokens += num_common
        num_reused = len(nodes) + (source is not None)
        return PrefixMatch(
            num_tokens=num_tokens,
            missing_key=self._key(sequence, len(nodes)) if len(nodes) < num_full else None,
            num_reused_blocks=num_reused * num_groups,
            num_missed_blocks=max(0, num_full - num_reused) * num_groups,
            nodes=nodes,
            source=source,
        )

    def start(
        self, sequence: KVSequence, prefix: PrefixMatch, num_tokens: int, reserve_tokens: int
    ) -> StartedSequence | None:
        """Give a sequence its first blocks: the shared ones of ``prefix`` and new ones.

        It may be freed again only after the step that it starts in is launched.

        Args:
            sequence: Holds no blocks yet.
            prefix: What ``find_prefix`` has just found.
            num_tokens: Tokens to have blocks for now, those of ``prefix`` included.
            reserve_tokens: Length up to which ``grow`` is promised to find blocks; no more than
                ``num_tokens`` promises nothing.

        Returns:
            The block table and what to copy into it, or None if it does not fit beside what the
            others hold and were promised; nothing has moved then. In groups of full attention,
            blocks of ``prefix`` that others hold cost nothing.
        """
        num_shared = len(prefix.nodes)
        num_new = self._blocks_for(num_tokens) - num_shared
        length = max(num_tokens, reserve_tokens)
        reserved, passed, tables = [], [], []
        for group in self._groups:
            first = min(group.first_block(prefix.num_tokens), num_shared)
            table = [node.block_ids[group.index] or 0 for node in prefix.nodes]
            num_own = group.max_own_blocks(length, num_shared)
            if not group.fits(table[first:], num_new, num_own, group.max_blocks(length)):
                return None
            reserved.append(num_own)
            passed.append(first)
            tables.append(table)
        sequence.num_shared_blocks = num_shared
        sequence.num_reserved_blocks, sequence.num_passed_blocks = reserved, passed
        sequence.block_ids = tuple(tables)
        sequence.node = prefix.nodes[-1] if prefix.nodes else None
        sequence.num_committed_tokens = num_shared * self.tokens_per_block
        self._sequences.add(sequence)
        for group, table, first, promised in zip(
            self._groups, tables, passed, reserved, strict=True
        ):
            group.pool.acquire(table[first:], sequence.retention_priority)
            self._num_shared_blocks += len(table) - first
            group.num_promised_blocks += group.outstanding(promised, 0)
        copies = self._copies(sequence, prefix, num_new)
        return StartedSequence(tuple(list(table) for table in tables), copies)

    def _copies(
        self, sequence: KVSequence, prefix: PrefixMatch, num_new: int
    ) -> tuple[list[tuple[int, int]], ...]:
        # The source may be evicted here and handed out in this very step, even to this sequence: a
        # step reads all sources before it writes anything.
        sources = [] if prefix.source is None else list(prefix.source.block_ids)
        for group, source in zip(self._groups, sources, strict=False):
            assert source is not None
            # It counts as used now, after the blocks before it.
            group.pool.acquire([source], sequence.retention_priority)
            group.pool.release([source], acquired=True)
        new_block_ids = self._allocate(sequence, num_new)
        return tuple(
            [(source, new[0])] if source is not None and source != new[0] else []
            for source, new in zip_longest(sources, new_block_ids)
        )

    def grow(
        self, sequence: KVSequence, num_computed_tokens: int, num_tokens: int
    ) -> BlockIds | None:
        """Extend the block tables to ``num_tokens`` tokens, and give back what windows have passed.

        Args:
            sequence: A started one.
            num_computed_tokens: Where its next step begins. No later one begins before that.
            num_tokens: Where that step ends.

        Returns:
            Per group, the blocks that were appended (often none), or None if there are not enough;
            nothing has moved then. Within what ``start`` promised it never comes to that, as long
            as every sequence keeps within its own.
        """
        missing_tokens = num_tokens - sequence.num_block_tokens
        count = self._blocks_for(missing_tokens) if missing_tokens > 0 else 0
        for group in self._full:
            if count > group.pool.num_free_blocks:
                return None
        if self._windowed and not self._pass_windows(sequence, num_computed_tokens, count):
            return None
        return self._allocate(sequence, count) if count else self._empty()

    def commit(self, sequence: KVSequence, num_tokens: int) -> None:
        """Make blocks findable whose first tokens are computed, accepted and sound.

        Args:
            sequence: A started one.
            num_tokens: So many; none of them is ever computed again.
        """
        if (
            not self.enable_block_reuse
            or sequence.private
            or num_tokens <= sequence.num_committed_tokens
        ):
            return
        if sequence.tail is not None:  # becomes the beginning of what is entered now
            self._remove_node(sequence.tail)
            sequence.tail = None
        if sequence.node is not None and not sequence.node.linked:
            # Evicted meanwhile: others held those blocks, or a window has passed them.
            sequence.private = True
            return
        size = self.tokens_per_block
        for index in range(sequence.num_committed_tokens // size, num_tokens // size):
            if not self._commit_block(sequence, index):
                sequence.private = True
                return
        sequence.num_committed_tokens = num_tokens
        if self.enable_partial_reuse and num_tokens % size and sequence.owns_path:
            self._commit_tail(sequence, num_tokens)
        if sequence.node is not None and not self._full:
            self._tree.prune(sequence.node)  # a small window may have passed its block already

    def free(self, sequence: KVSequence) -> None:
        """Give back all blocks and the reservation of a sequence; nothing to do if it has none."""
        if sequence not in self._sequences:
            return
        self._sequences.remove(sequence)
        for group, table, reserved in zip(
            self._groups, sequence.block_ids, sequence.num_reserved_blocks, strict=True
        ):
            num_own = len(table) - sequence.num_shared_blocks
            group.num_promised_blocks -= group.outstanding(reserved, num_own)
            self._release(sequence, group, len(table))
        tail = sequence.tail
        if tail is not None and tail.linked and self._is_idle(tail) and _is_covered(tail):
            self._remove_node(tail)
        if sequence.node is not None:
            self._tree.prune(sequence.node)
        sequence.reset()

    def keys_within(self, sequence: KVSequence, start: int, stop: int) -> list[bytes]:
        """Keys of the full blocks that computing the tokens [start, stop) completes."""
        if not self.enable_block_reuse:
            return []
        blocks = range(start // self.tokens_per_block, stop // self.tokens_per_block)
        return [self._key(sequence, index) for index in blocks]

    def check_integrity(self) -> None:
        """Check that every block is free, idle or held by the sequences known here, that what is
        promised is counted, and that the tree is well formed.

        Raises:
            AssertionError: The books are wrong.
        """
        self._tree.check_integrity(self.tokens_per_block)
        for index, group in enumerate(self._groups):
            self._check_group(index, group)

    def _check_group(self, index: int, group: _Group) -> None:
        holders: Counter[int] = Counter()
        sharers: Counter[int] = Counter()
        promised = 0
        for sequence in self._sequences:
            table, first = sequence.block_ids[index], sequence.num_passed_blocks[index]
            holders.update(table[first:])
            sharers.update(table[first : sequence.num_shared_blocks])
            num_own = len(table) - sequence.num_shared_blocks
            promised += group.outstanding(sequence.num_reserved_blocks[index], num_own)
            assert sequence.num_block_tokens == len(table) * self.tokens_per_block
        assert promised == group.num_promised_blocks, "promised blocks are miscounted"
        group.pool.check_integrity(holders, sharers, self._tree.findable(index))
        if group.window is None:
            self._check_leaves_first(index, group.pool)

    def _check_leaves_first(self, index: int, pool: BlockPool) -> None:
        # In use counts as younger than any idle block.
        place = {block_id: age for age, block_id in enumerate(pool.eviction_order())}
        for node in self._tree.nodes():
            block_id, parent = node.block_ids[index], node.parent
            assert block_id is not None, "a node without a block in a group of full attention"
            if parent is not None and parent.parent is not None:
                before = parent.block_ids[index]
                assert before is not None
                last = pool.num_blocks
                younger = place.get(before, last) >= place.get(block_id, last)
                assert younger, f"block {before} would be evicted before its child {block_id}"

    # --- blocks ---------------------------------------------------------------------------------

    def _empty(self) -> BlockIds:
        return tuple([] for _ in self.groups)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tokens_per_block)

    def _allocate(self, sequence: KVSequence, count: int) -> BlockIds:
        new_block_ids = []
        for group, table, reserved in zip(
            self._groups, sequence.block_ids, sequence.num_reserved_blocks, strict=True
        ):
            num_own = len(table) - sequence.num_shared_blocks
            before = group.outstanding(reserved, num_own)
            group.num_promised_blocks += group.outstanding(reserved, num_own + count) - before
            new = group.pool.allocate(count)
            table += new
            new_block_ids.append(new)
        self._num_allocated_blocks += count * len(new_block_ids)
        sequence.num_block_tokens = len(table) * self.tokens_per_block
        return tuple(new_block_ids)

    def _pass_windows(self, sequence: KVSequence, position: int, count: int) -> bool:
        # Gives back what the token at ``position`` does not see, if so many blocks are free then.
        passed = [group.first_block(position) for group in self._windowed]
        for group, stop in zip(self._windowed, passed, strict=True):
            start = sequence.num_passed_blocks[group.index]
            returned = sequence.block_ids[group.index][start:stop]
            num_returned = sum(group.pool.num_holders(block_id) == 1 for block_id in returned)
            if count > group.pool.num_free_blocks + num_returned:
                return False
        for group, stop in zip(self._windowed, passed, strict=True):
            self._release(sequence, group, stop)
        return True

    def _release(self, sequence: KVSequence, group: _Group, stop: int) -> None:
        # Gives back a table's blocks before ``stop``, the last ones first.
        start, table = sequence.num_passed_blocks[group.index], sequence.block_ids[group.index]
        if stop <= start:
            return
        shared = max(start, min(sequence.num_shared_blocks, stop))
        group.pool.release(reversed(table[shared:stop]))
        group.pool.release(reversed(table[start:shared]), acquired=True)
        sequence.num_passed_blocks[group.index] = stop

    def _evict(self, index: int, block_id: int) -> None:
        node = self._tree.node(index, block_id)
        if self._groups[index].window is None:
            # It is a leaf, and without this block the others of its tokens are of no use.
            self._remove_node(node)
        else:
            self._forget(node, index)
            self._tree.prune(node)

    # --- the tree -------------------------------------------------------------------------------

    def _chunk(self, sequence: KVSequence, index: int) -> tuple[int, ...]:
        chunks, size = sequence.chunks, self.tokens_per_block
        while len(chunks) <= index:
            start = len(chunks) * size
            chunks.append(tuple(sequence.token_ids[start : start + size]))
        return chunks[index]

    def _key(self, sequence: KVSequence, index: int) -> bytes:
        # Only the first block carries the extras: the others inherit them through their parent.
        keys = sequence.keys
        while len(keys) <= index:
            parent, extras = (keys[-1], ()) if keys else (ROOT_KEY, sequence.extras)
            keys.append(block_key(parent, self._chunk(sequence, len(keys)), extras))
        return keys[index]

    def _cached_nodes(self, sequence: KVSequence, limit: int) -> list[PrefixNode]:
        # The longest path of at most ``limit`` blocks whose end every group can go on from.
        node, nodes, num_found = self._tree.root(sequence.extras), [], 0
        gaps = [0] * len(self._groups)  # where the last one of each group ends
        for end in range(1, limit + 1):
            child = node.children.get(self._chunk(sequence, end - 1))
            if child is None:
                break
            node = child
            nodes.append(node)
            reaches = True
            for group in self._windowed:
                if node.block_ids[group.index] is None:
                    gaps[group.index] = end
                needed = group.first_block(end * self.tokens_per_block)
                reaches = reaches and gaps[group.index] <= needed
            if reaches:
                num_found = end
        return nodes[:num_found]

    def _commit_block(self, sequence: KVSequence, index: int) -> bool:
        # Whether the blocks after it may be entered as well.
        parent = sequence.node or self._tree.root(sequence.extras)
        tokens = self._chunk(sequence, index)
        node = parent.children.get(tokens)
        if node is None:
            if not sequence.owns_path:
                return False  # below the blocks of another it would not be evicted before them
            node = self._tree.add(parent, tokens)
        for g in range(len(self._groups)):
            if index >= sequence.num_passed_blocks[g]:
                self._enter(sequence, node, g, index)
        self._drop_covered_tails(parent, tokens)
        sequence.node = node
        return True

    def _enter(self, sequence: KVSequence, node: PrefixNode, group: int, index: int) -> None:
        # Where the tree has a block with these tokens that nobody holds, the sequence's own takes
        # its place and one becomes free. Where others hold it, the sequence's own stays private,
        # and so does in groups of full attention what follows.
        pool, priority = self._groups[group].pool, sequence.retention_priority
        is_full = self._groups[group].window is None
        if is_full and not sequence.owns_path:
            return  # below the blocks of another it would not be evicted before them
        other = node.block_ids[group]
        if other is not None:
            if pool.num_holders(other) > 0:
                sequence.owns_path &= not is_full
                return
            self._tree.remove_block(node, group)
            priority = max(priority, pool.forget(other))
        block_id = sequence.block_ids[group][index]
        self._tree.set_block(node, group, block_id)
        pool.keep(block_id, priority)
        if other is None and self._on_stored and not node.is_tail:
            self._on_stored(group, node)

    def _commit_tail(self, sequence: KVSequence, num_tokens: int) -> None:
        start = num_tokens // self.tokens_per_block * self.tokens_per_block
        tokens = tuple(sequence.token_ids[start:num_tokens])
        parent = sequence.node or self._tree.root(sequence.extras)
        if tokens in parent.tails or parent.longest_beginning(tokens)[1] == len(tokens):
            return  # there is a block that begins so
        sequence.tail = self._tree.add(parent, tokens, is_tail=True)
        for g in range(len(self._groups)):
            self._enter(sequence, sequence.tail, g, start // self.tokens_per_block)
        # Last, for with its last tail a parent without blocks leaves the tree.
        self._drop_covered_tails(parent, tokens)

    def _drop_covered_tails(self, parent: PrefixNode, tokens: tuple[int, ...]) -> None:
        # Tails that nobody holds and that are the beginning of these.
        for length in range(1, len(tokens)) if parent.tails else ():
            tail = parent.tails.get(tokens[:length])
            if tail is not None and self._is_idle(tail):
                self._remove_node(tail)

    def _is_idle(self, node: PrefixNode) -> bool:
        return not any(
            block_id is not None and group.pool.num_holders(block_id)
            for group, block_id in zip(self._groups, node.block_ids, strict=True)
        )

    def _remove_node(self, node: PrefixNode) -> None:
        for group, block_id in enumerate(node.block_ids):
            if block_id is not None:
                self._forget(node, group)
        self._tree.prune(node)

    def _forget(self, node: PrefixNode, group: int) -> None:
        self._groups[group].pool.forget(self._tree.remove_block(node, group))
        if self._on_removed and not node.is_tail:
            self._on_removed(group, node)
