"""Random histories of the KV cache, against blocks that hold what was really written into them.

Every slot of a block remembers the whole prefix whose K and V it stands for. A step applies its
copies and its writes to these blocks, as a runner does, and then each token must find in its block
table exactly what it sees. Steps are launched up to two at a time: the second is scheduled before
the result of the first has come back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmserve.core.kv_cache_manager import (
    KVCacheManager,
    KVSequence,
    PrefixMatch,
    max_sequence_blocks,
)
from llmserve.core.prefix_tree import PrefixNode
from llmserve.core.step import KVGroupSpec

VOCAB_SIZE = 2  # so few that sequences often share blocks
MAX_TOKENS = 30
DRAFT = -1  # a token that is never accepted

Content = tuple[Any, ...]  # (salt, tokens up to here)


@dataclass(eq=False)
class Running:
    """A sequence as the scheduler and the runner know it."""

    text: list[int]  # what it will come to
    token_ids: list[int]  # what is known of it
    salt: str | None
    sequence: KVSequence
    num_computed: int = 0
    tables: list[list[int]] = field(default_factory=list)
    freed: bool = False

    def contents(self, position: int) -> Content:
        return (self.salt, *self.text[: position + 1])


@dataclass
class Part:
    running: Running
    start: int
    stop: int  # behind what is accepted of it
    num_drafts: int


texts = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=MAX_TOKENS)
salts = st.sampled_from([None, None, None, "a", ""])


@st.composite
def asks(draw):
    text = draw(texts)
    return (
        text,
        draw(st.integers(1, len(text))),
        draw(salts),
        draw(st.sampled_from([0, 35, 35, 100])),
        draw(st.integers(1, 12)),
        draw(st.sampled_from([True, True, True, False])),
    )


class KVCacheMachine(RuleBasedStateMachine):
    @initialize(
        windows=st.sampled_from(
            [(None,), (None,), (5,), (1,), (2,), (None, 5), (9, None), (None, None), (3, 7)]
        ),
        num_blocks=st.integers(1, 14),
        other_num_blocks=st.integers(1, 14),
        tokens_per_block=st.integers(1, 5),
        max_step_tokens=st.integers(1, 12),
        reuse=st.sampled_from([True, True, True, False]),
        partial=st.sampled_from([True, True, False]),
        guaranteed=st.booleans(),
        tight=st.booleans(),
    )
    def create(
        self,
        windows,
        num_blocks,
        other_num_blocks,
        tokens_per_block,
        max_step_tokens,
        reuse,
        partial,
        guaranteed,
        tight,
    ):
        self.size, self.windows = tokens_per_block, windows
        self.reuse, self.partial, self.guaranteed = reuse, partial, guaranteed
        self.max_step_tokens = max_step_tokens
        num_blocks = (num_blocks, other_num_blocks)[: len(windows)]
        if tight and guaranteed:  # just enough for the longest sequence
            num_blocks = tuple(
                max_sequence_blocks(
                    MAX_TOKENS,
                    window,
                    max_step_tokens=max_step_tokens,
                    tokens_per_block=tokens_per_block,
                )
                for window in windows
            )
        self.kv = KVCacheManager(
            tuple(
                KVGroupSpec(layers=(index,), window=window, bytes_per_block=1)
                for index, window in enumerate(windows)
            ),
            num_blocks,
            tokens_per_block,
            max_step_tokens=max_step_tokens,
            enable_block_reuse=reuse,
            enable_partial_reuse=partial,
        )
        self.blocks: list[list[list[Content | None]]] = [
            [[None] * tokens_per_block for _ in range(count)] for count in num_blocks
        ]
        self.running: list[Running] = []
        self.under_way: deque[list[Part]] = deque()
        self.committed: set[Content] = set()

    # --- steps ----------------------------------------------------------------------------------

    @precondition(lambda self: len(self.under_way) < 2)
    @rule(new=st.lists(asks(), max_size=3), data=st.data())
    def step(self, new, data):
        """Schedule and launch a step of some running sequences and some new ones."""
        parts: list[Part] = []
        copies: list[list[tuple[int, int]]] = [[] for _ in self.windows]
        budget = self.max_step_tokens
        for running in list(self.running):
            left = min(budget, self._schedulable(running))
            if left == 0 or running.freed:
                continue
            part = self._continue(running, data.draw(st.integers(1, left)), budget, data)
            if part is not None:
                parts.append(part)
                budget -= part.stop - part.start + part.num_drafts
        for ask in new:
            if budget > 0:
                part = self._start(ask, budget, copies)
                if part is not None:
                    parts.append(part)
                    budget -= part.stop - part.start
        self._execute(parts, copies)
        self.under_way.append(parts)

    def _schedulable(self, running: Running) -> int:
        # Known tokens, or the one that a step under way is going to bring.
        known = len(running.token_ids)
        if running.num_computed < known:
            return known - running.num_computed
        pending = any(part.running is running for step in self.under_way for part in step)
        return int(pending and known < len(running.text))

    def _continue(self, running: Running, count: int, budget: int, data) -> Part | None:
        drafts = 0
        start, stop = running.num_computed, running.num_computed + count
        if not self.under_way and stop == len(running.token_ids):  # nothing else to wait for
            room = min(budget - count, MAX_TOKENS - stop)
            drafts = 0 if self.guaranteed else data.draw(st.integers(0, min(3, room)))
        free = self.kv.usage().free
        new = self.kv.grow(running.sequence, start, stop + drafts)
        if new is None:
            assert not self.guaranteed, "what was promised is not there"
            assert self.kv.usage().free == free
            return None
        for table, ids in zip(running.tables, new, strict=True):
            table += ids
        running.num_computed = stop
        return Part(running, start, stop, drafts)

    def _start(self, ask, budget: int, copies) -> Part | None:
        text, num_known, salt, priority, count, reuse = ask
        sequence = self.kv.new_sequence(text[:num_known], salt, priority)
        match = self.kv.find_prefix(sequence, reuse=reuse)
        self._check_match(match, sequence, salt, reuse)
        start = match.num_tokens
        stop = min(num_known, start + min(count, budget))
        reserve = len(text) if self.guaranteed else stop
        if reserve > self.kv.max_tokens:
            return None
        before = self.kv.usage()
        started = self.kv.start(sequence, match, stop, reserve)
        if started is None:
            assert before.free < before.total, "it does not fit the empty cache"
            assert self.kv.usage() == before
            return None
        for group, pairs in enumerate(started.block_copies):
            copies[group] += pairs
        running = Running(text, sequence.token_ids, salt, sequence, stop)
        running.tables = [list(ids) for ids in started.block_ids]
        self.running.append(running)
        return Part(running, start, stop, 0)

    def _execute(self, parts: list[Part], copies) -> None:
        for blocks, pairs in zip(self.blocks, copies, strict=True):
            sources = [list(blocks[src]) for src, _ in pairs]
            assert len({dst for _, dst in pairs}) == len(pairs), "copied over twice"
            for (_, dst), slots in zip(pairs, sources, strict=True):
                blocks[dst] = slots
        for group in range(len(self.windows)):
            for part in parts:
                self._write(part, group)
        for group, window in enumerate(self.windows):
            for part in parts:
                for position in range(part.start, part.stop):
                    self._check_visible(part.running, group, window, position)

    def _write(self, part: Part, group: int) -> None:
        running, size = part.running, self.size
        for position in range(part.start, part.stop + part.num_drafts):
            block_id = running.tables[group][position // size]
            for other in self.running:
                if other is not running and not other.freed:
                    first = other.sequence.num_passed_blocks[group]
                    assert block_id not in other.tables[group][first:], "another reads this"
            accepted = position < part.stop
            content = running.contents(position) if accepted else (DRAFT, position)
            self.blocks[group][block_id][position % size] = content

    def _check_visible(self, running: Running, group: int, window: int | None, position: int):
        first = 0 if window is None else max(0, position - window + 1)
        for seen in range(first, position + 1):
            block_id = running.tables[group][seen // self.size]
            assert self.blocks[group][block_id][seen % self.size] == running.contents(seen)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def update(self, data):
        """The oldest step comes back: what it sampled is appended, what it computed committed."""
        for part in self.under_way.popleft():
            running = part.running
            if running.freed:
                continue
            if part.stop == len(running.token_ids) < len(running.text):
                running.token_ids.append(running.text[part.stop])
            if data.draw(st.sampled_from([True, True, True, False])):
                self._commit(running, part.stop)

    def _commit(self, running: Running, num_tokens: int) -> None:
        self.kv.commit(running.sequence, num_tokens)
        self.committed |= {running.contents(position) for position in range(num_tokens)}

    @precondition(lambda self: any(not running.freed for running in self.running))
    @rule(data=st.data())
    def free(self, data):
        """One ends, or is paused, wherever it is: steps under way may still compute it."""
        running = data.draw(st.sampled_from([r for r in self.running if not r.freed]))
        self.kv.free(running.sequence)
        self.kv.free(running.sequence)
        running.freed = True
        self.running.remove(running)

    @precondition(lambda self: self.running)
    @rule()
    def free_all(self):
        for running in self.running:
            self.kv.free(running.sequence)
            running.freed = True
        self.running.clear()

    @precondition(lambda self: not self.under_way)
    @rule(text=texts, salt=salts)
    def look_up(self, text, salt):
        sequence = self.kv.new_sequence(text, salt)
        self._check_match(self.kv.find_prefix(sequence), sequence, salt, True)

    # --- what must hold -------------------------------------------------------------------------

    def _check_match(self, match: PrefixMatch, sequence: KVSequence, salt, reuse: bool) -> None:
        """It is what looking through everything that is kept finds, and was committed before."""
        tokens, size = sequence.token_ids, self.size
        kept = self._kept() if reuse else {}

        def usable(end: int, last: Content | None) -> bool:
            for group, window in enumerate(self.windows):
                first = 0 if window is None else max(0, end - window + 1) // size
                for index in range(first, -(-end // size)):
                    whole = (salt, *tokens[: (index + 1) * size])
                    content = whole if (index + 1) * size <= end else last
                    if kept.get(content, [None] * len(self.windows))[group] is None:
                        return False
            return True

        limit = len(tokens) - 1
        expected = 0
        for end in range(size, limit + 1, size):
            if (salt, *tokens[:end]) not in kept:
                break
            if usable(end, None):
                expected = end
        full = expected
        if self.partial:
            for content in kept:
                begins = content[: full + 1] == (salt, *tokens[:full])
                if begins and full < len(content) - 1 <= full + size and None not in kept[content]:
                    common = full
                    while (
                        common < min(limit, len(content) - 1)
                        and content[common + 1] == tokens[common]
                    ):
                        common += 1
                    expected = max(expected, common)
        assert match.num_tokens == expected
        if expected:
            assert (salt, *tokens[:expected]) in self.committed
        has_missing = reuse and self.reuse and full // size < len(tokens) // size
        assert (match.missing_key is not None) == has_missing
        groups = len(self.windows)
        reused = -(-expected // size) * groups
        assert match.num_reused_blocks == reused
        assert match.num_missed_blocks == max(0, len(tokens) // size * groups - reused)

    def _kept(self) -> dict[Content, list[int | None]]:
        kept = {}
        for node in self.kv._tree.nodes():
            content = self._content(node)
            assert content not in kept, "the same tokens twice"
            kept[content] = node.block_ids
        return kept

    def _content(self, node: PrefixNode) -> Content:
        tokens: list[int] = []
        while node.parent is not None:
            tokens[:0] = node.token_ids
            node = node.parent
        return (node.extras[1] if node.extras else None, *tokens)

    @invariant()
    def books_are_right(self):
        if hasattr(self, "kv"):
            self.kv.check_integrity()
            if not self.running:
                assert self.kv.usage().free == self.kv.usage().total
            if not self.reuse:
                assert self.kv.usage().idle == 0

    @invariant()
    def what_can_be_found_is_there(self):
        if hasattr(self, "kv"):
            for content, block_ids in self._kept().items():
                count = (len(content) - 2) % self.size + 1  # tokens in its last block
                start = len(content) - 1 - count
                for group, block_id in enumerate(block_ids):
                    if block_id is not None:
                        expected = [content[: start + i + 2] for i in range(count)]
                        assert self.blocks[group][block_id][:count] == expected


def run_machine(examples: int, steps: int) -> type:
    case = KVCacheMachine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return case


TestKVCacheMachine = run_machine(150, 30)


@pytest.mark.full
class TestKVCacheMachineLong(KVCacheMachine.TestCase):
    settings = settings(
        max_examples=3000,
        stateful_step_count=50,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
