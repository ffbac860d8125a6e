"""The blocks of one KV group: who holds each, and which ones can be found again by their content.

It owns reference counts, the free list and the reuse tree. It knows neither requests nor groups;
``kv_cache_manager`` is its only user.

A block is in exactly one of three states::

    free --allocate--> in use --release, registered------> idle (kept for reuse, ref count 0)
      ^                  |  ^                               |    |
      |                  |  +---------- acquire ------------+    |
      +-- release, not registered ------+                        |
      +<---------------------- evict, least recently used -------+

The reuse tree holds full blocks alone, each under a key that chains it to its parent. Whoever holds
a registered block holds its registered parent too, and releases a child before its parent. So idle
blocks stand in the order of their last use with every child before its parent, and taking the
oldest idle block always takes a leaf.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

KEY_BYTES = 16
ROOT_KEY = bytes(KEY_BYTES)  # parent of every first block


def block_key(parent_key: bytes, token_ids: Sequence[int], extras: tuple[str, ...] = ()) -> bytes:
    """Digest of a full block and, through its parent, of everything before it.

    It is the same in every process and on every machine, so it can be compared between engines.

    Args:
        parent_key: Key of the block before, ROOT_KEY for the first one.
        token_ids: The block's tokens, each in [0, 2**32).
        extras: Whatever else the KV depends on, or that keeps it apart (a cache salt).
    """
    digest = blake2b(parent_key, digest_size=KEY_BYTES)
    digest.update(struct.pack(f"<{len(token_ids)}I", *token_ids))
    for extra in extras:
        data = extra.encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<Q", len(data)) + data)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """A block of the reuse tree.

    Attributes:
        block_id: Where its KV lies.
        parent_id: The registered block before it, or None for a first block.
        key: ``block_key`` of what follows.
        token_ids: Its tokens; compared on a hit, for two contents may share a key.
        extras: As given to ``block_key``; compared as well.
    """

    block_id: int
    parent_id: int | None
    key: bytes
    token_ids: tuple[int, ...]
    extras: tuple[str, ...] = ()


class BlockPool:
    """Allocation, sharing and reuse of ``num_blocks`` equal blocks, ids 0 to num_blocks - 1.

    Args:
        num_blocks: Size of the pool.
        on_stored: Called with each block that enters the reuse tree.
        on_removed: Called with each block that leaves it.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        on_stored: Callable[[CachedBlock], None] | None = None,
        on_removed: Callable[[CachedBlock], None] | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self._on_stored = on_stored
        self._on_removed = on_removed
        self._ref_counts = [0] * num_blocks
        self._free = list(reversed(range(num_blocks)))  # a stack: low ids first, warm ones again
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._by_key: dict[bytes, CachedBlock] = {}
        self._by_id: dict[int, CachedBlock] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that ``allocate`` can hand out, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle_blocks(self) -> int:
        """Blocks that nobody holds, kept for reuse."""
        return len(self._idle)

    def is_idle(self, block_id: int) -> bool:
        """Whether acquiring this registered block makes one free block less."""
        return block_id in self._idle

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks for writing, evicting idle ones where free ones run out.

        Raises:
            ValueError: There are fewer (ask ``num_free_blocks`` first). Nothing has moved.
        """
        if count > self.num_free_blocks:
            raise ValueError(f"{count} blocks asked for, {self.num_free_blocks} are free")
        block_ids = []
        for _ in range(count):
            block_id = self._free.pop() if self._free else self._evict()
            self._ref_counts[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Share registered blocks that ``find`` returned, for reading."""
        for block_id in block_ids:
            self._idle.pop(block_id, None)
            self._ref_counts[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Give back a whole block table, in its order. Registered blocks stay findable."""
        for block_id in reversed(block_ids):  # children before parents: the order of eviction
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] > 0:
                continue
            if block_id in self._by_id:
                self._idle[block_id] = None
            else:
                self._free.append(block_id)

    def find(
        self, key: bytes, parent_id: int | None, token_ids: tuple[int, ...], extras: tuple[str, ...]
    ) -> int | None:
        """The registered block with this content after ``parent_id``, or None. Moves nothing."""
        cached = self._by_key.get(key)
        if cached is None or cached.parent_id != parent_id:
            return None
        return cached.block_id if (cached.token_ids, cached.extras) == (token_ids, extras) else None

    def register(self, cached: CachedBlock) -> None:
        """Enter a block in use, full and computed, into the reuse tree.

        Nothing happens if its key is taken (two requests computed the same content side by side:
        the second copy stays private and is freed with its request) or if its parent is such a
        private copy (it would hang below a block that its holder does not hold).
        """
        orphan = cached.parent_id is not None and cached.parent_id not in self._by_id
        if orphan or cached.key in self._by_key:
            return
        self._by_key[cached.key] = self._by_id[cached.block_id] = cached
        if self._on_stored:
            self._on_stored(cached)

    def _evict(self) -> int:
        block_id, _ = self._idle.popitem(last=False)
        cached = self._by_id.pop(block_id)
        del self._by_key[cached.key]
        if self._on_removed:
            self._on_removed(cached)
        return block_id

    def check_integrity(self, holders: Counter[int]) -> None:
        """Check that no block is lost or in two places.

        Args:
            holders: How many block tables name each block.

        Raises:
            AssertionError: The pool's books are wrong.
        """
        free, idle = set(self._free), set(self._idle)
        used = {i for i, count in enumerate(self._ref_counts) if count > 0}
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert len(free) + len(idle) + len(used) == self.num_blocks, "a block is lost or doubled"
        assert free | idle | used == set(range(self.num_blocks)), "a block has two states"
        for block_id in range(self.num_blocks):
            count = self._ref_counts[block_id]
            assert count == holders[block_id], f"block {block_id}: {count} references"
        assert set(self._by_id) >= idle, "an idle block cannot be found"
        assert not free & set(self._by_id), "a free block can be found"
        assert len(self._by_key) == len(self._by_id), "a key and its block have parted"
        age = {block_id: position for position, block_id in enumerate(self._idle)}
        for block_id, cached in self._by_id.items():
            assert self._by_key[cached.key] is cached, f"block {block_id} is under a wrong key"
            parent = cached.parent_id
            if parent is not None:
                assert parent in self._by_id, f"block {block_id} has lost its parent"
                # In use counts as younger than any idle block.
                younger = age.get(parent, self.num_blocks) >= age.get(block_id, self.num_blocks)
                assert younger, f"block {parent} would be evicted before its child {block_id}"
