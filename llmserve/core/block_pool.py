"""The blocks of one KV group: who holds each, and which of those that nobody holds goes next.

It owns reference counts, the free list and the order of eviction. It knows neither tokens nor
requests: what a block holds stands in ``prefix_tree``. ``kv_cache_manager`` is its only user.

A block is in exactly one of three states::

    free --allocate--> in use --release, findable--> idle (kept for reuse, no holder)
      ^                  |  ^                          |   |
      |                  |  +--------- acquire --------+   |
      +- release, not findable                             |
      +<-------------------- forget -----------------------+

Idle blocks go by retention priority, lower first, and among equals the least recently used first. A
block that several requests use keeps the highest of their priorities.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable


class BlockPool:
    """Allocation and sharing of ``num_blocks`` equal blocks, ids 0 to num_blocks - 1.

    Args:
        num_blocks: Size of the pool.
        evict: Called with the idle block that goes next, when no other is free; has to ``forget``
            it.
    """

    def __init__(self, num_blocks: int, evict: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self.num_shared_blocks = 0
        """Blocks with a holder that ``acquire`` d them."""
        self.num_idle_blocks = 0
        """Blocks that nobody holds, kept for reuse."""
        self._evict = evict
        self._num_holders = [0] * num_blocks
        self._num_sharers = [0] * num_blocks  # holders that acquired it
        self._free = list(reversed(range(num_blocks)))  # a stack: low ids first, warm ones again
        self._priorities: dict[int, int] = {}  # of the findable ones
        self._idle: dict[int, OrderedDict[int, None]] = {}  # by priority, least recently used first

    @property
    def num_free_blocks(self) -> int:
        """Blocks that ``allocate`` can hand out, idle ones included."""
        return len(self._free) + self.num_idle_blocks

    def num_holders(self, block_id: int) -> int:
        """How many block tables name this block; 0 for one that is free or idle."""
        return self._num_holders[block_id]

    def is_shared(self, block_id: int) -> bool:
        """Whether a holder acquired it."""
        return self._num_sharers[block_id] > 0

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks for writing, evicting idle ones where free ones run out.

        Raises:
            ValueError: There are fewer (ask ``num_free_blocks`` first). Nothing has moved.
        """
        if count > self.num_free_blocks:
            raise ValueError(f"{count} blocks asked for, {self.num_free_blocks} are free")
        while len(self._free) < count:
            self._evict(next(iter(self._idle[min(self._idle)])))
        block_ids = [self._free.pop() for _ in range(count)]
        for block_id in block_ids:
            self._num_holders[block_id] = 1
        return block_ids

    def acquire(self, block_ids: Iterable[int], priority: int) -> None:
        """Share findable blocks, for reading."""
        for block_id in block_ids:
            if self._num_holders[block_id] == 0:
                self._remove_idle(block_id)
            if self._num_sharers[block_id] == 0:
                self.num_shared_blocks += 1
            self._num_holders[block_id] += 1
            self._num_sharers[block_id] += 1
            if priority > self._priorities[block_id]:
                self._priorities[block_id] = priority

    def release(self, block_ids: Iterable[int], *, acquired: bool = False) -> None:
        """Give blocks back.

        Args:
            block_ids: Children before their parents: what comes first is evicted first.
            acquired: Whether the holder had them of ``acquire``, or of ``allocate``.
        """
        for block_id in block_ids:
            if acquired:
                self._num_sharers[block_id] -= 1
                if self._num_sharers[block_id] == 0:
                    self.num_shared_blocks -= 1
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] == 0:
                self._add_unused(block_id)

    def _add_unused(self, block_id: int) -> None:
        priority = self._priorities.get(block_id)
        if priority is None:
            self._free.append(block_id)
        else:
            self._idle.setdefault(priority, OrderedDict())[block_id] = None
            self.num_idle_blocks += 1

    def keep(self, block_id: int, priority: int) -> None:
        """A block in use can be found from now on, and is idle after its last holder."""
        self._priorities[block_id] = priority

    def forget(self, block_id: int) -> int:
        """A block cannot be found any more; if it is idle, it is free. Return its priority."""
        if self._num_holders[block_id] == 0:
            self._remove_idle(block_id)
            self._free.append(block_id)
        return self._priorities.pop(block_id)

    def _remove_idle(self, block_id: int) -> None:
        priority = self._priorities[block_id]
        blocks = self._idle[priority]
        del blocks[block_id]
        if not blocks:
            del self._idle[priority]
        self.num_idle_blocks -= 1

    def eviction_order(self) -> list[int]:
        """Idle blocks, the next to go first."""
        return [block_id for _, blocks in sorted(self._idle.items()) for block_id in blocks]

    def check_integrity(
        self, holders: Counter[int], sharers: Counter[int], findable: set[int]
    ) -> None:
        """Check that no block is lost or in two places.

        Args:
            holders: How many block tables name each block.
            sharers: How many of them acquired it.
            findable: The blocks of the prefix tree.

        Raises:
            AssertionError: The pool's books are wrong.
        """
        free, order = set(self._free), self.eviction_order()
        idle = set(order)
        used = {i for i, count in enumerate(self._num_holders) if count > 0}
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert len(idle) == len(order) == self.num_idle_blocks, "idle blocks are miscounted"
        assert len(free) + len(idle) + len(used) == self.num_blocks, "a block is lost or doubled"
        assert free | idle | used == set(range(self.num_blocks)), "a block has two states"
        for block_id, count in enumerate(self._num_holders):
            assert count == holders[block_id], f"block {block_id}: {count} holders"
        for block_id, count in enumerate(self._num_sharers):
            assert count == sharers[block_id], f"block {block_id}: {count} sharers"
        shared = sum(count > 0 for count in self._num_sharers)
        assert shared == self.num_shared_blocks, "shared blocks are miscounted"
        assert set(self._priorities) == findable, "a block is findable here or there alone"
        assert idle <= findable, "an idle block cannot be found"
        assert not free & findable, "a free block can be found"
        for priority, blocks in self._idle.items():
            assert blocks, f"priority {priority} has no blocks"
            assert all(self._priorities[i] == priority for i in blocks), "a wrong priority"
