import pytest

from llmserve.core.kv_cache_manager import KVCacheManager, KVSequence, PrefixMatch
from llmserve.core.step import KVGroupSpec


def create_kv(num_blocks=8, *, groups=1, reuse=True, **events) -> KVCacheManager:
    pools = (num_blocks,) * groups if isinstance(num_blocks, int) else num_blocks
    specs = tuple(KVGroupSpec(layers=(g,), window=None, bytes_per_block=1) for g in range(groups))
    return KVCacheManager(specs, pools, 4, reuse, **events)


def start(kv: KVCacheManager, tokens, reserve=None, salt=None) -> KVSequence:
    """A sequence with blocks for all of its tokens."""
    sequence = kv.new_sequence(list(tokens), salt)
    prefix = kv.find_prefix(sequence)
    assert kv.start(sequence, prefix, len(tokens), reserve or len(tokens)) is not None
    return sequence


def computed(kv: KVCacheManager, tokens, salt=None) -> KVSequence:
    sequence = start(kv, tokens, salt=salt)
    kv.commit(sequence, len(tokens))
    return sequence


def prefix_of(kv: KVCacheManager, tokens, salt=None) -> PrefixMatch:
    return kv.find_prefix(kv.new_sequence(list(tokens), salt))


def test_blocks_cover_the_tokens_and_grow_by_need():
    kv = create_kv()
    sequence = start(kv, range(5))
    assert [len(ids) for ids in sequence.block_ids] == [2]
    assert kv.grow(sequence, 8) == ([],)
    (new,) = kv.grow(sequence, 9)
    assert sequence.block_ids[0][2:] == new
    assert kv.usage().free == 5
    kv.check_integrity()


def test_growing_is_all_or_nothing_over_groups():
    kv = create_kv((8, 2), groups=2)
    sequence = start(kv, range(8))
    assert kv.grow(sequence, 9) is None
    assert [len(ids) for ids in sequence.block_ids] == [2, 2]
    assert kv.usage().free == 6
    kv.check_integrity()


def test_starting_is_all_or_nothing():
    kv = create_kv(4)
    first = computed(kv, range(8))
    kv.free(first)
    sequence = kv.new_sequence([*range(8), *range(50, 62)], None)  # 5 blocks, 2 of them cached
    prefix = kv.find_prefix(sequence)
    assert prefix.num_tokens == 8
    assert kv.start(sequence, prefix, 9, 20) is None  # blocks for 9 there are, but not for 20
    assert sequence.block_ids == ([],)
    assert (kv.usage().free, kv.usage().idle) == (4, 2)
    kv.check_integrity()


def test_a_reservation_is_kept_from_others_until_it_is_used_or_given_back():
    kv = create_kv(6)
    first = start(kv, range(4), reserve=16)  # holds 1, may take 3 more
    other = kv.new_sequence(list(range(100, 112)), None)
    prefix = kv.find_prefix(other)
    assert kv.start(other, prefix, 12, 12) is None  # needs 3, and 2 are not promised
    assert kv.start(other, prefix, 4, 8) is not None
    for tokens in (8, 12, 16):
        assert kv.grow(first, tokens) is not None
    assert kv.grow(other, 8) is not None
    assert kv.usage().free == 0
    kv.free(first)
    assert kv.start(kv.new_sequence([1, 2], None), PrefixMatch(0, ([],), None), 2, 16) is not None
    kv.check_integrity()


def test_sharing_what_another_holds_costs_nothing():
    kv = create_kv(4)
    first = computed(kv, range(8))
    assert start(kv, [*range(8), 90, 91]).block_ids[0][:2] == first.block_ids[0]
    assert kv.usage().free == 1


def test_sharing_idle_blocks_takes_them_out_of_what_is_free():
    # 4 blocks, 2 idle: a request of 5 blocks does not fit though 2 are reused and 4 are free.
    kv = create_kv(4)
    kv.free(computed(kv, range(8)))
    holder = start(kv, range(100, 104))  # one of the two that were never used
    sequence = kv.new_sequence([*range(8), *range(50, 58)], None)
    prefix = kv.find_prefix(sequence)
    assert prefix.num_tokens == 8
    assert kv.start(sequence, prefix, 16, 16) is None
    kv.free(holder)
    assert kv.start(sequence, prefix, 16, 16) is not None
    kv.check_integrity()


def test_the_last_token_is_always_computed():
    kv = create_kv()
    computed(kv, range(8))
    assert prefix_of(kv, range(8)).num_tokens == 4
    assert prefix_of(kv, range(8)).missing_key is None  # there is nothing more to wait for
    assert prefix_of(kv, range(9)).num_tokens == 8


def test_only_full_computed_blocks_are_found():
    kv = create_kv()
    sequence = start(kv, range(12))
    assert prefix_of(kv, range(12)).num_tokens == 0
    kv.commit(sequence, 7)
    assert prefix_of(kv, range(12)).num_tokens == 4
    kv.commit(sequence, 11)
    assert prefix_of(kv, range(12)).num_tokens == 8


def test_a_prefix_ends_where_the_tokens_differ():
    kv = create_kv()
    computed(kv, range(12))
    match = prefix_of(kv, [0, 1, 2, 3, 4, 5, 6, 99, 8, 9, 10, 11, 12])
    assert match.num_tokens == 4
    assert match.missing_key is not None


def test_generated_blocks_are_found_in_the_next_turn():
    kv = create_kv()
    sequence = start(kv, range(6))
    sequence.token_ids += [50, 51, 52]  # generated; the last one is not computed yet
    kv.grow(sequence, 8)
    kv.commit(sequence, 8)
    kv.free(sequence)
    assert prefix_of(kv, [*range(6), 50, 51, 52, 7]).num_tokens == 8


def test_salts_keep_tenants_apart():
    kv = create_kv(16)
    computed(kv, range(8), salt="a")
    assert prefix_of(kv, range(9), salt="a").num_tokens == 8
    assert prefix_of(kv, range(9), salt="b").num_tokens == 0
    assert prefix_of(kv, range(9), salt="").num_tokens == 0
    assert prefix_of(kv, range(9)).num_tokens == 0
    computed(kv, range(8))
    assert prefix_of(kv, range(9)).num_tokens == 8


def test_a_prefix_counts_only_as_far_as_every_group_has_it():
    kv = create_kv((8, 3), groups=2)
    kv.free(computed(kv, range(12)))
    kv.free(start(kv, range(100, 104)))  # evicts one block, a leaf, from the small group alone
    match = prefix_of(kv, range(13))
    assert match.num_tokens == 8
    assert [len(ids) for ids in match.block_ids] == [2, 2]


def test_without_reuse_nothing_is_found_or_kept():
    kv = create_kv(reuse=False)
    sequence = computed(kv, range(8))
    assert prefix_of(kv, range(9)) == PrefixMatch(0, ([],), None)
    assert kv.keys_within(sequence, 0, 8) == []
    kv.free(sequence)
    assert kv.usage().idle == 0


def test_keys_within_a_range_are_those_of_the_blocks_it_completes():
    kv = create_kv()
    sequence = start(kv, range(15))
    assert len(kv.keys_within(sequence, 0, 15)) == 3
    assert kv.keys_within(sequence, 2, 7) == kv.keys_within(sequence, 0, 4)
    assert kv.keys_within(sequence, 4, 7) == []
    assert prefix_of(kv, range(15)).missing_key == kv.keys_within(sequence, 0, 4)[0]


def test_freeing_twice_is_harmless():
    kv = create_kv()
    sequence = start(kv, range(8))
    kv.free(sequence)
    kv.free(sequence)
    assert kv.usage().free == 8
    kv.check_integrity()


def test_events_name_the_group():
    events = []
    kv = create_kv(
        (4, 2),
        groups=2,
        on_stored=lambda group, block: events.append(("stored", group, block.token_ids)),
        on_removed=lambda group, block: events.append(("removed", group, block.token_ids)),
    )
    kv.free(computed(kv, range(4)))
    start(kv, range(50, 58))
    stored = [("stored", group, (0, 1, 2, 3)) for group in (0, 1)]
    assert events == [*stored, ("removed", 1, (0, 1, 2, 3))]


def test_max_tokens_is_the_smallest_group():
    assert create_kv((8, 3), groups=2).max_tokens == 12


@pytest.mark.parametrize(("pools", "groups"), [((4,), 2), ((0,), 1), ((), 0)])
def test_pools_must_match_the_groups(pools, groups):
    with pytest.raises(ValueError):
        create_kv(pools, groups=groups)
