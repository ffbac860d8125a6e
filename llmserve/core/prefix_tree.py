"""What the KV blocks hold: a tree of blocks of tokens, by which a prefix is found again.

Each node is one block's tokens after those of its parents. It names the block that holds their K
and V in every KV group, or None in a group of sliding-window layers that has it no more. Children
are looked up by their tokens, so a hit has compared all of them. A *tail* is a block filled in
part: its beginning can be copied, and when it is full it becomes a child. It never has children.

The tree knows neither who holds a block nor when one is evicted.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain, islice

KEY_BYTES = 16
ROOT_KEY = bytes(KEY_BYTES)  # parent of every first block
# Of children of one node, the newest so many are looked at for a common beginning.
MAX_COMPARED_CHILDREN = 32


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


@dataclass(slots=True, eq=False)
class PrefixNode:
    """A block's tokens, and where their K and V lie.

    Attributes:
        token_ids: The block's tokens; fewer than a block holds in a tail.
        parent: What comes before; None for a root, which has no tokens.
        block_ids: Per KV group, the block or None.
        is_tail: Whether it is a partly filled block.
        children: Full blocks that follow, by their tokens.
        tails: Partly filled ones.
        extras: Of a root: what else the KV below depends on, or that keeps it apart.
        linked: Whether it is in the tree.
    """

    token_ids: tuple[int, ...]
    parent: PrefixNode | None
    block_ids: list[int | None]
    is_tail: bool = False
    children: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict)
    tails: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    linked: bool = True

    def key(self) -> bytes:
        """``block_key`` of its tokens and all before them, worked out from the root."""
        path = [self]
        while path[-1].parent is not None:
            path.append(path[-1].parent)
        key, extras = ROOT_KEY, path.pop().extras
        for node in reversed(path):  # the first block carries the extras, the others inherit them
            key, extras = block_key(key, node.token_ids, extras), ()
        return key

    @property
    def is_bare(self) -> bool:
        """Whether nothing depends on it: no block, nothing below it."""
        if self.children or self.tails:
            return False
        return all(block_id is None for block_id in self.block_ids)

    def longest_beginning(
        self, token_ids: Sequence[int], besides: PrefixNode | None = None
    ) -> tuple[PrefixNode | None, int]:
        """The block below it that has most first tokens in common with these, and how many.

        Only those count that every KV group has, and that are not ``besides``.
        """
        best, longest = None, 0
        newest = chain(reversed(self.tails.values()), reversed(self.children.values()))
        for node in islice(newest, MAX_COMPARED_CHILDREN):
            if node is besides or None in node.block_ids:
                continue
            common = _num_common(node.token_ids, token_ids)
            if common > longest:
                best, longest = node, common
        return best, longest


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


class PrefixTree:
    """All prefixes whose blocks are kept, apart for each ``extras``.

    Args:
        num_groups: KV groups of the model.
    """

    def __init__(self, num_groups: int) -> None:
        self._num_groups = num_groups
        self._roots: dict[tuple[str, ...], PrefixNode] = {}
        self._by_block: tuple[dict[int, PrefixNode], ...] = tuple({} for _ in range(num_groups))

    def root(self, extras: tuple[str, ...]) -> PrefixNode:
        """What first blocks hang on; it enters the tree with the first of them."""
        return self._roots.get(extras) or PrefixNode(
            (), None, [None] * self._num_groups, extras=extras, linked=False
        )

    def add(
        self, parent: PrefixNode, token_ids: tuple[int, ...], *, is_tail: bool = False
    ) -> PrefixNode:
        """Enter a node without blocks.

        Args:
            parent: Of the tree, or what ``root`` gave.
            token_ids: Not below ``parent`` yet.
            is_tail: Whether they fill a part of a block.
        """
        if not parent.linked:
            assert parent.parent is None, "what was taken out of the tree does not come back"
            parent.linked = True
            self._roots[parent.extras] = parent
        node = PrefixNode(token_ids, parent, [None] * self._num_groups, is_tail)
        (parent.tails if is_tail else parent.children)[token_ids] = node
        return node

    def set_block(self, node: PrefixNode, group: int, block_id: int) -> None:
        """K and V of a node lie in this block."""
        node.block_ids[group] = block_id
        self._by_block[group][block_id] = node

    def remove_block(self, node: PrefixNode, group: int) -> int:
        """They do no more; return the block. ``prune`` the node afterwards."""
        block_id = node.block_ids[group]
        assert block_id is not None
        node.block_ids[group] = None
        del self._by_block[group][block_id]
        return block_id

    def node(self, group: int, block_id: int) -> PrefixNode:
        """The node of a findable block."""
        return self._by_block[group][block_id]

    def prune(self, node: PrefixNode) -> None:
        """Take a node out if nothing depends on it, and then its parents likewise."""
        while node.linked and node.is_bare:
            node.linked = False
            parent = node.parent
            if parent is None:
                del self._roots[node.extras]
                return
            del (parent.tails if node.is_tail else parent.children)[node.token_ids]
            node = parent

    def nodes(self) -> Iterator[PrefixNode]:
        """All nodes but the roots, parents before their children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack += [*node.children.values(), *node.tails.values()]

    def findable(self, group: int) -> set[int]:
        """Blocks of a group that the tree names."""
        return set(self._by_block[group])

    def check_integrity(self, tokens_per_block: int) -> None:
        """Check that the tree is well formed.

        Raises:
            AssertionError: It is not.
        """
        num_blocks = 0
        for node in self.nodes():
            parent = node.parent
            assert parent is not None
            assert node.linked, "a node was taken out and is still there"
            assert parent.linked, "a node hangs on one that was taken out"
            assert not node.is_bare, "a node is of no use"
            size = len(node.token_ids)
            assert size < tokens_per_block if node.is_tail else size == tokens_per_block
            assert not (node.is_tail and (node.children or node.tails)), "a tail has children"
            for group, block_id in enumerate(node.block_ids):
                if block_id is not None:
                    assert self._by_block[group].get(block_id) is node, "a block has two nodes"
                    num_blocks += 1
        assert num_blocks == sum(map(len, self._by_block)), "a block's node is out of the tree"
