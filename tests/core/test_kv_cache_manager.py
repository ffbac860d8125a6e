import sys

import pytest

from llmserve.core.kv_cache_manager import (
    KVCacheManager,
    KVSequence,
    PrefixMatch,
    max_sequence_blocks,
)
from llmserve.core.prefix_tree import ROOT_KEY, block_key
from llmserve.core.step import KVGroupSpec


def create_kv(num_blocks=8, windows=(None,), *, max_step_tokens=100, **settings) -> KVCacheManager:
    pools = (num_blocks,) * len(windows) if isinstance(num_blocks, int) else num_blocks
    specs = tuple(
        KVGroupSpec(layers=(g,), window=window, bytes_per_block=1)
        for g, window in enumerate(windows)
    )
    return KVCacheManager(specs, pools, 4, max_step_tokens=max_step_tokens, **settings)


def start(kv: KVCacheManager, tokens, reserve=0, salt=None, priority=35, **find) -> KVSequence:
    """A sequence with blocks for all of its tokens."""
    sequence = kv.new_sequence(list(tokens), salt, priority)
    prefix = kv.find_prefix(sequence, **find)
    assert kv.start(sequence, prefix, len(tokens), reserve) is not None
    return sequence


def computed(kv: KVCacheManager, tokens, **settings) -> KVSequence:
    sequence = start(kv, tokens, **settings)
    kv.commit(sequence, len(tokens))
    return sequence


def prefix_of(kv: KVCacheManager, tokens, salt=None) -> PrefixMatch:
    kv.check_integrity()
    return kv.find_prefix(kv.new_sequence(list(tokens), salt))


def found(kv: KVCacheManager, tokens, salt=None) -> int:
    return prefix_of(kv, tokens, salt).num_tokens


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


# --- room ---------------------------------------------------------------------------------------


def test_blocks_cover_the_tokens_and_grow_by_need():
    kv = create_kv()
    sequence = start(kv, range(5))
    assert sequence.num_block_tokens == 8
    assert kv.grow(sequence, 5, 8) == ([],)
    (new,) = kv.grow(sequence, 8, 9)
    assert sequence.block_ids[0][2:] == new
    assert sequence.num_block_tokens == 12
    assert kv.usage().free == 5
    kv.check_integrity()


@pytest.mark.parametrize("window", [None, 100])
def test_growing_is_all_or_nothing_over_groups(window):
    kv = create_kv((8, 2), (None, window))
    sequence = start(kv, range(8))
    assert kv.grow(sequence, 8, 9) is None
    assert [len(ids) for ids in sequence.block_ids] == [2, 2]
    assert kv.usage().free == 6
    kv.check_integrity()


def test_growing_gives_nothing_back_when_there_is_no_room():
    kv = create_kv((3, 4), (None, 5))
    sequence = start(kv, range(12))
    assert kv.grow(sequence, 12, 13) is None  # two blocks are behind the window by now
    assert sequence.num_passed_blocks == [0, 0]
    assert kv.usage().free == 1
    kv.check_integrity()


def test_starting_is_all_or_nothing():
    kv = create_kv(4)
    kv.free(computed(kv, range(8)))
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
        assert kv.grow(first, tokens - 1, tokens) is not None
    assert kv.grow(other, 7, 8) is not None
    assert kv.usage().free == 0
    kv.free(first)
    assert kv.start(kv.new_sequence([1, 2], None), PrefixMatch(), 2, 16) is not None
    kv.check_integrity()


def test_sharing_what_another_holds_costs_nothing():
    kv = create_kv(4)
    first = computed(kv, range(8))
    assert start(kv, [*range(8), 90, 91]).block_ids[0][:2] == first.block_ids[0]
    assert kv.usage().free == 1


def test_sharing_idle_blocks_takes_them_out_of_what_is_free():
    # 4 blocks, 2 idle: a request of 4 blocks does not fit though 2 are reused and 3 are free.
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


def test_freeing_twice_is_harmless_and_it_can_start_again():
    kv = create_kv()
    sequence = computed(kv, range(9))
    kv.free(sequence)
    kv.free(sequence)
    assert kv.usage().free == 8
    prefix = kv.find_prefix(sequence)
    assert prefix.num_tokens == 8
    assert kv.start(sequence, prefix, 9, 9) is not None
    kv.check_integrity()


@pytest.mark.parametrize(("pools", "windows"), [((4,), (None,) * 2), ((0,), (None,)), ((), ())])
def test_pools_must_match_the_groups(pools, windows):
    with pytest.raises(ValueError):
        create_kv(pools, windows)


# --- what is found ------------------------------------------------------------------------------


def test_the_last_token_is_always_computed():
    kv = create_kv(enable_partial_reuse=False)
    computed(kv, range(8))
    assert found(kv, range(8)) == 4
    assert found(kv, range(9)) == 8


def test_the_last_token_is_computed_alone_where_the_rest_can_be_copied():
    kv = create_kv()
    computed(kv, range(8))
    assert found(kv, range(8)) == 7


def test_only_committed_tokens_are_found():
    kv = create_kv()
    sequence = start(kv, range(12))
    assert found(kv, range(12)) == 0
    for count in (3, 7, 8, 11):
        kv.commit(sequence, count)
        assert found(kv, range(12)) == count
    kv.commit(sequence, 5)  # nothing new
    assert found(kv, range(12)) == 11


def test_without_partial_reuse_only_full_blocks_are_found():
    kv = create_kv(enable_partial_reuse=False)
    sequence = start(kv, range(12))
    for count, expected in ((3, 0), (7, 4), (11, 8)):
        kv.commit(sequence, count)
        assert found(kv, range(12)) == expected


def test_a_prefix_ends_where_the_tokens_differ():
    kv = create_kv()
    computed(kv, range(12))
    match = prefix_of(kv, [0, 1, 2, 3, 4, 5, 99, 7, 8, 9, 10, 11, 12])
    assert match.num_tokens == 6
    assert (match.num_reused_blocks, match.num_missed_blocks) == (2, 1)


def test_generated_tokens_are_found_in_the_next_turn():
    kv = create_kv()
    sequence = start(kv, range(6))
    sequence.token_ids += [50, 51, 52, 53, 54]  # the last one is not computed yet
    kv.grow(sequence, 6, 10)
    kv.commit(sequence, 10)
    kv.free(sequence)
    assert found(kv, [*range(6), 50, 51, 52, 53, 54, 7]) == 10


def test_salts_keep_tenants_apart():
    kv = create_kv(16)
    computed(kv, range(8), salt="a")
    assert found(kv, range(9), salt="a") == 8
    assert found(kv, range(9), salt="b") == 0
    assert found(kv, range(9), salt="") == 0
    assert found(kv, range(9)) == 0
    computed(kv, range(8))
    assert found(kv, range(9)) == 8


def test_a_hit_compares_tokens_and_not_their_digest(monkeypatch):
    monkeypatch.setattr("llmserve.core.kv_cache_manager.block_key", lambda *_: b"the same")
    kv = create_kv()
    computed(kv, range(8))
    assert found(kv, range(100, 109)) == 0
    assert found(kv, [*range(4), *range(100, 105)]) == 4


def test_without_reuse_nothing_is_found_or_kept():
    kv = create_kv(enable_block_reuse=False)
    sequence = computed(kv, range(8))
    assert prefix_of(kv, range(9)) == PrefixMatch(num_missed_blocks=2)
    assert kv.keys_within(sequence, 0, 8) == []
    kv.free(sequence)
    assert kv.usage().idle == 0


def test_a_request_may_refuse_what_is_there():
    kv = create_kv()
    computed(kv, range(8))
    sequence = kv.new_sequence(list(range(9)), None)
    assert kv.find_prefix(sequence, reuse=False) == PrefixMatch(num_missed_blocks=2)
    assert kv.start(sequence, kv.find_prefix(sequence, reuse=False), 9, 9) is not None
    kv.commit(sequence, 9)
    kv.check_integrity()


def test_keys_within_a_range_are_those_of_the_blocks_it_completes():
    kv = create_kv()
    sequence = start(kv, range(15))
    assert len(kv.keys_within(sequence, 0, 15)) == 3
    assert kv.keys_within(sequence, 2, 7) == kv.keys_within(sequence, 0, 4)
    assert kv.keys_within(sequence, 4, 7) == []


def test_the_missing_key_is_of_the_first_full_block_to_wait_for():
    kv = create_kv()
    sequence = start(kv, range(15))
    keys = kv.keys_within(sequence, 0, 15)
    assert prefix_of(kv, range(15)).missing_key == keys[0]
    kv.commit(sequence, 6)  # a copy of two tokens does not make it less missing
    assert prefix_of(kv, range(15)).missing_key == keys[1]
    assert prefix_of(kv, range(8)).missing_key == keys[1]
    assert prefix_of(kv, range(7)).missing_key is None
    kv.commit(sequence, 12)
    assert prefix_of(kv, range(15)).missing_key is None


def test_events_name_the_group_and_full_blocks_alone():
    events = []
    kv = create_kv(
        (4, 2),
        (None, 4),
        on_stored=lambda group, node: events.append(("stored", group, node.token_ids)),
        on_removed=lambda group, node: events.append(("removed", group, node.token_ids)),
    )
    kv.free(computed(kv, range(6)))
    start(kv, range(50, 58))
    stored = [("stored", group, (0, 1, 2, 3)) for group in (0, 1)]
    assert events == [*stored, ("removed", 1, (0, 1, 2, 3))]


# --- sharing, copying, eviction -----------------------------------------------------------------


def test_answers_to_one_prompt_share_its_blocks_and_copy_its_end():
    kv = create_kv(16)
    prompt = list(range(10))
    first = computed(kv, prompt)
    first.token_ids += [100, 101]
    siblings = []
    for answer in range(3):
        sequence = kv.new_sequence(list(prompt), None)
        match = kv.find_prefix(sequence)
        assert (match.num_tokens, match.missing_key) == (9, None)
        started = kv.start(sequence, match, 10, 12)
        assert started is not None
        (table,) = started.block_ids
        assert table[:2] == first.block_ids[0][:2]
        assert started.block_copies == ([(first.block_ids[0][2], table[2])],)
        kv.commit(sequence, 10)
        sequence.token_ids += [200 + answer, 0]
        siblings.append(sequence)
    kv.check_integrity()
    for sequence in (*siblings, first):
        kv.commit(sequence, 12)
        assert found(kv, [*sequence.token_ids, 1]) == 12
        kv.free(sequence)
    assert kv.usage().idle == 2 + 4


def test_a_tail_can_be_copied_while_its_owner_goes_on_writing_behind_it():
    kv = create_kv()
    first = computed(kv, range(6))
    first.token_ids += [6, 7, 8]
    assert kv.grow(first, 6, 9) is not None
    assert found(kv, range(9)) == 6
    kv.commit(first, 9)
    assert found(kv, range(9)) == 8
    assert found(kv, [*range(6), 99]) == 6  # of the block that is full by now


def test_a_tail_that_a_longer_one_covers_is_dropped_when_nobody_holds_it():
    kv = create_kv()
    short = computed(kv, range(6))
    kv.free(short)
    assert kv.usage().idle == 2
    longer = computed(kv, range(7))  # the full block is shared, six tokens are copied
    kv.free(longer)
    assert kv.usage().idle == 2
    assert found(kv, range(9)) == 7
    # One that is still held goes when its holder does.
    held = start(kv, [*range(50, 56)])
    kv.commit(held, 6)
    kv.free(computed(kv, [*range(50, 58)]))
    assert kv.usage().idle == 3
    kv.free(held)
    assert kv.usage().idle == 4
    assert found(kv, range(50, 59)) == 8


def test_the_source_of_a_copy_may_be_the_block_it_goes_to():
    kv = create_kv(1)
    kv.free(computed(kv, range(3)))
    sequence = kv.new_sequence([0, 1, 9], None)
    match = kv.find_prefix(sequence)
    assert match.num_tokens == 2
    started = kv.start(sequence, match, 3, 3)
    assert started is not None
    assert (started.block_ids, started.block_copies) == (([0],), ([],))
    kv.check_integrity()


def test_the_source_of_a_copy_counts_as_used():
    kv = create_kv(4)
    kv.free(computed(kv, range(3)))
    kv.free(computed(kv, range(10, 13)))
    kv.free(start(kv, [0, 1, 50]))
    kv.free(start(kv, range(100, 112)))  # three blocks: one of the two idle ones goes
    assert (found(kv, range(4)), found(kv, range(10, 14))) == (3, 0)


def test_lower_priorities_are_evicted_first_and_leaves_before_their_parents():
    kv = create_kv(5)
    kv.free(computed(kv, range(4), priority=0))
    kv.free(computed(kv, range(10, 18), priority=80))
    # The shared beginning is worth what its best user is.
    kv.free(computed(kv, [*range(4), *range(20, 24)], priority=50))
    left = []
    for number in range(4):
        held = start(kv, [1000 + number])
        left.append((found(kv, [*range(4), *range(20, 24), 9]), found(kv, [*range(10, 18), 9])))
        assert held.num_block_tokens == 4
    assert left == [(8, 8), (4, 8), (0, 8), (0, 4)]


def test_a_second_copy_that_others_hold_stays_private_and_so_does_what_follows():
    kv = create_kv(8)
    first = start(kv, range(8))
    second = start(kv, range(8))  # in the same step: nothing was there to share
    kv.commit(first, 8)
    second.token_ids += [50, 51, 52, 53]
    kv.grow(second, 8, 12)
    kv.commit(second, 12)
    kv.check_integrity()
    assert found(kv, second.token_ids) == 8
    kv.free(second)
    assert kv.usage().idle == 0


def test_a_second_copy_takes_the_place_of_one_that_nobody_holds():
    kv = create_kv(8)
    kv.free(computed(kv, range(8)))
    second = start(kv, range(8), reuse=False)
    second.token_ids += [50, 51, 52, 53]
    kv.grow(second, 8, 12)
    kv.commit(second, 12)
    kv.check_integrity()
    assert kv.usage().free == 5
    assert kv.usage().idle == 0
    assert found(kv, [*second.token_ids, 1]) == 12


def test_below_the_blocks_of_another_nothing_takes_a_place():
    kv = create_kv(8)
    kv.free(computed(kv, range(8)))
    holder = start(kv, [*range(4), 99])  # of the first block; nobody holds the second
    second = computed(kv, range(8), reuse=False)
    kv.free(holder)
    kv.check_integrity()  # else the first would be idle above a block in use
    kv.free(second)
    assert kv.usage().idle == 2


def test_a_prefix_counts_only_as_far_as_every_group_has_it():
    kv = create_kv((8, 3), (None, None))
    kv.free(computed(kv, range(12)))
    kv.free(start(kv, range(100, 104)))  # evicts one block, a leaf
    assert found(kv, range(13)) == 8
    assert kv.usage().idle == 4  # in the other group it is of no use any more


# --- windows ------------------------------------------------------------------------------------


def test_blocks_behind_the_window_are_given_back():
    kv = create_kv(8, (6,), enable_block_reuse=False)
    sequence = start(kv, range(16))
    # The token at 12 sees 7 to 12, the one at 13 sees 8 to 13, the one at 17 sees 12 to 17.
    for position, passed, held in ((12, 1, 3), (13, 2, 2), (16, 2, 3), (17, 3, 2)):
        assert kv.grow(sequence, position, position + 1) is not None
        assert sequence.num_passed_blocks == [passed]
        assert kv.usage().free == 8 - held
        kv.check_integrity()
    assert len(sequence.block_ids[0]) == 5


def test_what_lost_its_place_in_the_tree_stays_out_of_it():
    kv = create_kv(2, (1,))
    sequence = computed(kv, range(4))
    sequence.token_ids += range(4, 8)
    assert kv.grow(sequence, 4, 7) is not None  # the first block is passed
    kv.free(start(kv, [50]))  # and evicted
    kv.commit(sequence, 7)
    kv.check_integrity()
    assert found(kv, range(8)) == 0


def test_a_window_runs_for_ever_in_a_pool_of_its_size():
    blocks = max_sequence_blocks(10**6, 6, max_step_tokens=3, tokens_per_block=4)
    assert blocks == 3
    kv = create_kv(blocks, (6,), max_step_tokens=3)
    assert kv.max_tokens == sys.maxsize
    sequence = start(kv, [0], reserve=10**6)
    for position in range(1, 400, 3):
        sequence.token_ids += [position, position + 1, position + 2]
        assert kv.grow(sequence, position, position + 3) is not None
        kv.commit(sequence, position + 3)
        kv.check_integrity()


@pytest.mark.parametrize("tokens_per_block", [1, 4, 5])
@pytest.mark.parametrize("window", [1, 2, 6, 8])
@pytest.mark.parametrize("max_step_tokens", [1, 3, 8])
def test_max_sequence_blocks_is_reached_and_not_exceeded(tokens_per_block, window, max_step_tokens):
    def held(start: int, stop: int) -> int:
        first = max(0, start - window + 1) // tokens_per_block
        return -(-stop // tokens_per_block) - first

    for num_tokens in range(1, 40):
        most = max(
            held(start, min(num_tokens, start + max_step_tokens)) for start in range(num_tokens)
        )
        bound = max_sequence_blocks(
            num_tokens, window, max_step_tokens=max_step_tokens, tokens_per_block=tokens_per_block
        )
        assert most <= bound <= most + 1
    assert bound == most  # far enough from the end that any alignment comes up


def test_a_prefix_needs_only_the_window_before_its_end():
    kv = create_kv((8, 3), (None, 5), max_step_tokens=4)
    sequence = computed(kv, range(8))
    sequence.token_ids += range(8, 17)
    for stop in (12, 16):
        assert kv.grow(sequence, stop - 4, stop) is not None
        kv.commit(sequence, stop)
    kv.free(sequence)
    # Four of the full group; of the other the last three: 0 to 4 is gone.
    assert kv.usage().idle == 4 + 3
    match = prefix_of(kv, range(17))
    assert match.num_tokens == 16
    follower = kv.new_sequence(list(range(17)), None)
    started = kv.start(follower, kv.find_prefix(follower), 17, 17)
    assert started is not None
    full, windowed = started.block_ids
    assert full[:4] == [node.block_ids[0] for node in match.nodes]
    assert windowed[3] == match.nodes[3].block_ids[1]
    assert follower.num_passed_blocks == [0, 3]  # the token at 16 sees 12 to 16
    kv.check_integrity()
    kv.free(follower)
    # The first block is gone from the group with the window, and with it what needs it.
    assert found(kv, range(5)) == 0
    assert found(kv, [*range(12), 99]) == 12


def test_a_gap_in_the_window_ends_the_prefix_before_it():
    kv = create_kv((16, 4), (None, 6))
    kv.free(computed(kv, range(16)))
    # The youngest of the windowed blocks is the first one: its children go before it.
    kv.free(start(kv, range(100, 104)))
    assert found(kv, range(17)) == 12
    assert kv.usage().idle == 4 + 3


def test_what_a_window_lost_is_filled_in_by_the_next_that_computes_it():
    kv = create_kv((16, 5), (None, 6))
    first = computed(kv, range(8))  # goes on, and holds its blocks
    first.token_ids += range(8, 20)
    assert kv.grow(first, 8, 15) is not None
    assert kv.grow(first, 15, 16) is not None  # both first blocks are passed
    kv.free(start(kv, range(100, 112)))  # and evicted
    assert found(kv, range(9)) == 0
    second = computed(kv, range(8))
    assert second.block_ids[0] != first.block_ids[0][:2]
    assert found(kv, range(9)) == 8
    kv.free(first)
    kv.check_integrity()


@pytest.mark.parametrize(("num_blocks", "num_started"), [(5, 1), (6, 2)])
def test_a_reservation_counts_what_is_shared_behind_a_window(num_blocks, num_started):
    # Two shared blocks and two of each one's own, and none is passed before the end.
    kv = create_kv((64, num_blocks), (None, 12), max_step_tokens=4)
    prompt = list(range(8))
    kv.free(computed(kv, prompt))
    sequences = []
    for number in range(3):
        sequence = kv.new_sequence([*prompt, 100 + number], None)
        if kv.start(sequence, kv.find_prefix(sequence), 9, 16) is not None:
            sequences.append(sequence)
    assert len(sequences) == num_started
    for sequence in sequences:
        for position in range(9, 16):
            sequence.token_ids.append(position)
            assert kv.grow(sequence, position, position + 1) is not None
            kv.check_integrity()


def test_alone_a_sequence_needs_no_more_for_what_it_shares():
    blocks = max_sequence_blocks(40, 8, max_step_tokens=4, tokens_per_block=4)
    kv = create_kv(blocks, (8,), max_step_tokens=4)
    kv.free(computed(kv, range(8)))
    sequence = start(kv, range(9), reserve=40)  # else it would wait for ever
    assert sequence.num_shared_blocks == 2
    other = kv.new_sequence([50], None)
    assert kv.start(other, kv.find_prefix(other), 1, 40) is None
    for position in range(9, 40):
        sequence.token_ids.append(position)
        assert kv.grow(sequence, position, position + 1) is not None
        kv.check_integrity()


def test_max_tokens_is_that_of_the_smallest_group():
    assert create_kv((8, 3), (None, None)).max_tokens == 12
    # 5 - 1 + 100 tokens may lie in 27 blocks: fewer bound the sequence, more never do.
    assert create_kv((100, 26), (None, 5)).max_tokens == 26 * 4
    assert create_kv((100, 27), (None, 5)).max_tokens == 400


@pytest.mark.parametrize(
    "harm",
    [
        lambda kv: setattr(kv._groups[0], "num_promised_blocks", 5),
        lambda kv: kv._sequences.clear(),
        lambda kv: kv._tree._roots.clear(),
        lambda kv: next(iter(kv._tree.nodes())).block_ids.__setitem__(0, 7),
        lambda kv: next(iter(kv._sequences)).block_ids[0].append(7),
        lambda kv: kv._groups[0].pool._idle[35].popitem(),
        lambda kv: (
            kv._groups[0]
            .pool._idle[35]
            .move_to_end(
                kv._groups[0].pool.eviction_order()[0]  # a leaf, behind its parent
            )
        ),
        lambda kv: setattr(next(iter(kv._tree.nodes())), "linked", False),
    ],
)
def test_integrity_check_sees_harm(harm):
    kv = create_kv()
    computed(kv, range(8), reserve=12)
    kv.free(computed(kv, range(50, 58)))
    kv.check_integrity()
    harm(kv)
    with pytest.raises(AssertionError):
        kv.check_integrity()
