from collections import Counter

import pytest

from llmserve.core.block_pool import BlockPool


def create_pool(num_blocks: int) -> BlockPool:
    """A pool that forgets what is evicted, as the prefix tree would have it."""
    pool = BlockPool(num_blocks, lambda block_id: evict(block_id))

    def evict(block_id: int) -> None:
        pool.forget(block_id)

    return pool


def kept(pool: BlockPool, count: int, priority: int = 35) -> list[int]:
    """Blocks in use that can be found, each below the one before."""
    block_ids = pool.allocate(count)
    for block_id in block_ids:
        pool.keep(block_id, priority)
    return block_ids


def check(pool: BlockPool, holders=(), sharers=(), findable=()) -> None:
    pool.check_integrity(Counter(holders), Counter(sharers), set(findable))


def test_allocates_every_block_once_and_no_more():
    pool = create_pool(3)
    assert sorted(pool.allocate(3)) == [0, 1, 2]
    assert pool.num_free_blocks == 0
    with pytest.raises(ValueError, match="1 blocks asked for, 0 are free"):
        pool.allocate(1)
    check(pool, [0, 1, 2])


def test_nothing_moves_when_there_are_too_few():
    pool = create_pool(3)
    held = pool.allocate(1)
    with pytest.raises(ValueError):
        pool.allocate(3)
    assert pool.num_free_blocks == 2
    check(pool, held)


def test_findable_blocks_stay_and_others_do_not():
    pool = create_pool(4)
    (block,) = kept(pool, 1)
    (plain,) = pool.allocate(1)
    pool.release([block])
    pool.release([plain])
    assert (pool.num_idle_blocks, pool.num_free_blocks) == (1, 4)
    pool.acquire([block], 35)
    assert (pool.num_idle_blocks, pool.num_free_blocks) == (0, 3)
    check(pool, [block], [block], [block])


def test_a_shared_block_is_free_after_its_last_holder():
    pool = create_pool(1)
    (block,) = kept(pool, 1)
    pool.acquire([block], 35)
    assert (pool.num_holders(block), pool.num_shared_blocks) == (2, 1)
    pool.release([block])
    assert (pool.num_free_blocks, pool.is_shared(block)) == (0, True)
    check(pool, [block], [block], [block])
    pool.release([block], acquired=True)
    assert (pool.num_free_blocks, pool.num_shared_blocks) == (1, 0)
    check(pool, [], [], [block])


def test_evicts_the_least_recently_used_first_and_children_before_parents():
    pool = create_pool(5)
    old, new = kept(pool, 3), kept(pool, 2)
    pool.release(reversed(old))
    pool.release(reversed(new))
    order = [old[2], old[1], old[0], new[1], new[0]]
    assert pool.eviction_order() == order
    assert [pool.allocate(1)[0] for _ in order] == order


def test_what_was_used_again_outlives_what_was_not():
    pool = create_pool(4)
    old, new = kept(pool, 2), kept(pool, 2)
    pool.release(reversed(old))
    pool.release(reversed(new))
    pool.acquire(old[:1], 35)
    pool.release(old[:1], acquired=True)
    assert pool.eviction_order() == [old[1], new[1], new[0], old[0]]


def test_lower_priorities_go_first_whatever_their_age():
    pool = create_pool(4)
    high, middle, low = kept(pool, 1, 80), kept(pool, 2, 35), kept(pool, 1, 0)
    for block_ids in (middle, high, low):
        pool.release(block_ids)
    assert pool.eviction_order() == [*low, *middle, *high]
    assert pool.allocate(3) == [*reversed(middle), *low]  # the free list is a stack
    assert pool.eviction_order() == high


def test_a_block_keeps_the_highest_priority_of_its_users():
    pool = create_pool(2)
    first, second = kept(pool, 1, 10), kept(pool, 1, 35)
    for priority in (80, 0):
        pool.acquire(first, priority)
        pool.release(first, acquired=True)
    pool.release(first)
    pool.release(second)
    assert pool.eviction_order() == [*second, *first]
    assert pool.forget(first[0]) == 80


def test_free_blocks_are_taken_before_idle_ones():
    pool = create_pool(3)
    block_ids = kept(pool, 1)
    pool.release(block_ids)
    pool.allocate(2)
    assert pool.eviction_order() == block_ids


def test_what_is_forgotten_in_use_is_free_after_its_last_holder():
    pool = create_pool(2)
    block_ids = kept(pool, 1)
    pool.forget(block_ids[0])
    check(pool, block_ids)
    pool.release(block_ids)
    assert (pool.num_idle_blocks, pool.num_free_blocks) == (0, 2)


@pytest.mark.parametrize(
    "harm",
    [
        lambda pool: pool._free.append(pool._free[0]),
        lambda pool: pool._free.pop(),
        lambda pool: pool._num_holders.__setitem__(0, 2),
        lambda pool: pool._num_sharers.__setitem__(0, 2),
        lambda pool: setattr(pool, "num_shared_blocks", 7),
        lambda pool: setattr(pool, "num_idle_blocks", 7),
        lambda pool: pool._priorities.pop(0),
        lambda pool: pool._priorities.__setitem__(1, 99),
        lambda pool: pool._idle[35].__setitem__(3, None),
    ],
)
def test_integrity_check_sees_harm(harm):
    pool = create_pool(4)
    used, idle = kept(pool, 2)
    pool.release([idle])
    check(pool, [used], [], [used, idle])
    harm(pool)
    with pytest.raises(AssertionError):
        check(pool, [used], [], [used, idle])
