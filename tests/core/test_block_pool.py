from collections import Counter

import pytest

from llmserve.core.block_pool import ROOT_KEY, BlockPool, CachedBlock, block_key


def cached(pool_block, parent, tokens, parent_key=ROOT_KEY, extras=()):
    return CachedBlock(
        pool_block, parent, block_key(parent_key, tokens, extras), tuple(tokens), extras
    )


def chain(pool: BlockPool, *contents: list[int]) -> list[CachedBlock]:
    """Allocate and register one block per content, each below the one before."""
    blocks: list[CachedBlock] = []
    for block_id, tokens in zip(pool.allocate(len(contents)), contents, strict=True):
        parent = blocks[-1] if blocks else None
        key = parent.key if parent else ROOT_KEY
        blocks.append(cached(block_id, parent and parent.block_id, tokens, key))
        pool.register(blocks[-1])
    return blocks


def find(pool: BlockPool, block: CachedBlock) -> int | None:
    return pool.find(block.key, block.parent_id, block.token_ids, block.extras)


def test_key_is_the_same_in_every_process():
    # Pinned: keys are compared between engines and after a restart.
    assert block_key(ROOT_KEY, [1, 2, 3, 4]).hex() == "f23680cf9d0cdff61c7fe464c491f63b"
    assert (
        block_key(block_key(ROOT_KEY, [1]), [2], ("cache_salt", "a")).hex()
        == "0d4d850db60f8fa287cf6dc51306c039"
    )


def test_key_tells_parents_tokens_and_extras_apart():
    keys = [
        block_key(ROOT_KEY, [1, 2]),
        block_key(ROOT_KEY, [2, 1]),
        block_key(block_key(ROOT_KEY, [0, 0]), [1, 2]),
        block_key(ROOT_KEY, [1, 2], ("",)),
        block_key(ROOT_KEY, [1, 2], ("ab",)),
        block_key(ROOT_KEY, [1, 2], ("a", "b")),
    ]
    assert len(set(keys)) == len(keys)


def test_allocates_every_block_once_and_no_more():
    pool = BlockPool(3)
    assert sorted(pool.allocate(3)) == [0, 1, 2]
    assert pool.num_free_blocks == 0
    with pytest.raises(ValueError, match="1 blocks asked for, 0 are free"):
        pool.allocate(1)
    pool.check_integrity(Counter([0, 1, 2]))


def test_nothing_moves_when_there_are_too_few():
    pool = BlockPool(3)
    held = pool.allocate(1)
    with pytest.raises(ValueError):
        pool.allocate(3)
    assert pool.num_free_blocks == 2
    pool.check_integrity(Counter(held))


def test_registered_blocks_stay_findable_and_others_do_not():
    pool = BlockPool(4)
    (block,) = chain(pool, [1, 2])
    (plain,) = pool.allocate(1)
    pool.release([block.block_id])
    pool.release([plain])
    assert find(pool, block) == block.block_id
    assert (pool.num_idle_blocks, pool.num_free_blocks) == (1, 4)
    pool.acquire([block.block_id])
    assert (pool.num_idle_blocks, pool.num_free_blocks) == (0, 3)
    pool.check_integrity(Counter([block.block_id]))


def test_a_shared_block_is_free_after_its_last_holder():
    pool = BlockPool(1)
    (block,) = chain(pool, [1, 2])
    pool.acquire([block.block_id])
    pool.release([block.block_id])
    assert pool.num_free_blocks == 0
    pool.check_integrity(Counter([block.block_id]))
    pool.release([block.block_id])
    assert pool.num_free_blocks == 1


def test_a_hit_compares_tokens_parent_and_extras_and_not_the_key_alone():
    pool = BlockPool(4)
    first, second = chain(pool, [1, 2], [3, 4])
    assert pool.find(second.key, first.block_id, (3, 4), ()) == second.block_id
    assert pool.find(second.key, first.block_id, (3, 5), ()) is None
    assert pool.find(second.key, None, (3, 4), ()) is None
    assert pool.find(second.key, first.block_id, (3, 4), ("cache_salt", "x")) is None


def test_evicts_the_least_recently_used_and_leaves_first():
    pool = BlockPool(5)
    old = chain(pool, [1], [2], [3])
    new = chain(pool, [7], [8])
    pool.release([block.block_id for block in old])
    pool.release([block.block_id for block in new])
    for expected_lost in [old[2], old[1], old[0], new[1], new[0]]:
        assert find(pool, expected_lost) is not None
        pool.allocate(1)
        assert find(pool, expected_lost) is None


def test_a_prefix_used_again_outlives_what_was_not():
    pool = BlockPool(5)
    old = chain(pool, [1], [2])
    new = chain(pool, [7], [8])
    pool.release([block.block_id for block in old])
    pool.release([block.block_id for block in new])
    pool.acquire([old[0].block_id])  # a third request shares the first block of ``old``
    pool.release([old[0].block_id])
    pool.allocate(4)  # one that was never used, three to evict
    assert find(pool, old[0]) is not None
    assert [find(pool, block) for block in (old[1], *new)] == [None] * 3


def test_free_blocks_are_taken_before_cached_ones():
    pool = BlockPool(3)
    (block,) = chain(pool, [1])
    pool.release([block.block_id])
    pool.allocate(2)
    assert find(pool, block) == block.block_id


def test_a_second_copy_stays_private_and_so_does_what_follows_it():
    pool = BlockPool(4)
    (block,) = chain(pool, [1])
    copy, child = pool.allocate(2)
    pool.register(cached(copy, None, [1]))
    pool.register(cached(child, copy, [2], block.key))
    assert find(pool, block) == block.block_id
    assert pool.find(block_key(block.key, [2]), block.block_id, (2,), ()) is None
    pool.release([copy, child])
    assert (pool.num_idle_blocks, pool.num_free_blocks) == (0, 3)
    pool.check_integrity(Counter([block.block_id]))


def test_tells_what_is_stored_and_removed():
    events: list[tuple[str, int]] = []
    pool = BlockPool(
        2,
        on_stored=lambda block: events.append(("stored", block.token_ids[0])),
        on_removed=lambda block: events.append(("removed", block.token_ids[0])),
    )
    blocks = chain(pool, [1], [2])
    pool.release([block.block_id for block in blocks])
    pool.allocate(2)
    assert events == [("stored", 1), ("stored", 2), ("removed", 2), ("removed", 1)]


@pytest.mark.parametrize(
    "harm",
    [
        lambda pool: pool._free.append(pool._free[0]),
        lambda pool: pool._free.pop(),
        lambda pool: pool._ref_counts.__setitem__(0, 2),
        lambda pool: pool._by_key.clear(),
        lambda pool: pool._idle.__setitem__(3, None),
        lambda pool: pool._by_id.pop(0),
    ],
)
def test_integrity_check_sees_harm(harm):
    pool = BlockPool(4)
    blocks = chain(pool, [1], [2])
    holders = Counter(block.block_id for block in blocks)
    pool.check_integrity(holders)
    harm(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity(holders)
