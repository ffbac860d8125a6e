"""A deterministic ModelRunner without a model, for tests of scheduling and of the engine around it.

Its "KV cache" is real in what matters: it is paged, it is written and read through the block tables
that the scheduler sends, and every next token depends on everything read back from it. A wrong
block table, a block handed on too early or a wrong ``num_computed_tokens`` changes the answer (see
``expected_tokens``) or raises AssertionError on the spot. It knows nothing of sampling parameters.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from llmserve.core.step import (
    KVGroupSpec,
    ModelRunnerOutput,
    ScheduledRequest,
    SchedulerOutput,
)
from llmserve.runtime.model_runner import ModelInfo

BYTES_PER_BLOCK = 1024


def expected_tokens(prompt: Sequence[int], count: int, *, vocab_size: int = 256) -> list[int]:
    """The ``count`` tokens that a FakeRunner generates after ``prompt``, however it is batched."""
    values: list[bytes] = []
    generated: list[int] = []
    for position, token_id in enumerate(prompt):
        values.append(_slot_value(values[-1] if values else b"", token_id, position))
    for position in range(len(prompt), len(prompt) + count):
        generated.append(_next_token(values, vocab_size))
        values.append(_slot_value(values[-1], generated[-1], position))
    return generated


def _slot_value(previous: bytes, token_id: int, position: int) -> bytes:
    # Like a layer's K and V, it depends on the token and on everything before it.
    return blake2b(previous + b"%d@%d" % (token_id, position), digest_size=8).digest()


def _next_token(values: Sequence[bytes], vocab_size: int) -> int:
    return int.from_bytes(blake2b(b"".join(values), digest_size=8).digest(), "big") % vocab_size


@dataclass(frozen=True, slots=True)
class _Slot:
    token_id: int
    position: int
    value: bytes


_Cache = list[list[_Slot | None]]  # by block id, then by offset in the block


@dataclass(slots=True)
class _Sequence:
    token_ids: list[int]
    block_ids: tuple[list[int], ...]


class FakeRunner:
    """Implements ModelRunner in plain Python, with optional delays and failures.

    Args:
        max_batch_size: Asserted for every step.
        max_num_tokens: Asserted for every step.
        max_seq_len: Asserted for every request.
        tokens_per_block: Tokens of one block.
        num_groups: KV groups; each has its own cache and block tables.
        vocab_size: Generated ids are in [0, vocab_size).
        step_s: Seconds that each step takes.
        step_computes: Whether it computes for that time; otherwise it sleeps.
        fail_at_step: The step (counted from 0, empty ones too) at which ``finish`` raises.
        errors: By request id, a sentence with which that request fails when it would sample.
    """

    def __init__(
        self,
        *,
        max_batch_size: int = 8,
        max_num_tokens: int = 64,
        max_seq_len: int = 256,
        tokens_per_block: int = 4,
        num_groups: int = 1,
        vocab_size: int = 256,
        step_s: float = 0.0,
        step_computes: bool = False,
        fail_at_step: int | None = None,
        errors: Mapping[str, str] | None = None,
    ) -> None:
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.tokens_per_block = tokens_per_block
        self.step_s = step_s
        self.step_computes = step_computes
        self.fail_at_step = fail_at_step
        self.errors = dict(errors or {})
        self.num_steps = 0
        self.info = ModelInfo(
            vocab_size=vocab_size,
            max_seq_len=max_seq_len,
            kv_groups=tuple(
                KVGroupSpec(layers=(group,), window=None, bytes_per_block=BYTES_PER_BLOCK)
                for group in range(num_groups)
            ),
            weights_bytes=0,
            workspace_bytes=0,
            device="cpu",
            dtype="float32",
            quant_algo=None,
        )
        self._caches: list[_Cache] = []
        self._sequences: dict[str, _Sequence] = {}
        self._under_way: SchedulerOutput | None = None

    @property
    def known_request_ids(self) -> set[str]:
        """Requests it was told of and not yet told to forget."""
        return set(self._sequences)

    def available_kv_bytes(self) -> int:
        """Room for 64 blocks in each group."""
        return 64 * BYTES_PER_BLOCK * len(self.info.kv_groups)

    def allocate_kv_cache(self, num_blocks: tuple[int, ...]) -> None:
        """Make empty blocks, one count per group."""
        assert len(num_blocks) == len(self.info.kv_groups)
        self._caches = [
            [[None] * self.tokens_per_block for _ in range(count)] for count in num_blocks
        ]

    def warm_up(self) -> None:
        """There is nothing to warm."""

    def launch(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        """Accept a step. The handle is the step itself."""
        assert self._under_way is None, "a step is under way already"
        assert self._caches, "launch before allocate_kv_cache"
        self._under_way = scheduler_output
        return scheduler_output

    def finish(self, handle: SchedulerOutput, masks: Any = None) -> ModelRunnerOutput:
        """Compute the step.

        Raises:
            AssertionError: The step breaks a rule of the protocol.
            RuntimeError: At ``fail_at_step``.
        """
        assert masks is None, "grammar masks are not implemented"
        assert handle is self._under_way, "finish of a step that is not under way"
        self._under_way = None
        step, self.num_steps = self.num_steps, self.num_steps + 1
        end_s = time.monotonic() + self.step_s
        while self.step_computes and time.monotonic() < end_s:
            pass
        if not self.step_computes and self.step_s:
            time.sleep(self.step_s)
        if step == self.fail_at_step:
            raise RuntimeError(f"the fake runner fails at step {step}, as it was asked to")
        self._learn(handle)
        self._check_limits(handle)
        for group in range(len(self._caches)):
            self._check_writes(handle, group)
        output = ModelRunnerOutput()
        for scheduled in handle.scheduled:
            self._compute(scheduled, output)
        return output

    def shutdown(self) -> None:
        """Drop the cache."""
        self._caches = []
        self._sequences = {}

    def _learn(self, step: SchedulerOutput) -> None:
        assert not step.block_copies, "block copies are not implemented"
        for request_id in step.finished_request_ids:
            assert request_id in self._sequences, f"{request_id} ends and was never told of"
            del self._sequences[request_id]
        for new in step.new_requests:
            assert new.request_id not in self._sequences, f"{new.request_id} is known already"
            assert 0 < new.num_prompt_tokens <= len(new.token_ids) < self.info.max_seq_len
            tables: tuple[list[int], ...] = tuple([] for _ in self._caches)
            self._sequences[new.request_id] = _Sequence(list(new.token_ids), tables)
        for scheduled in step.scheduled:
            tables = self._sequences[scheduled.request_id].block_ids
            for block_ids, new_block_ids in zip(tables, scheduled.new_block_ids, strict=True):
                block_ids.extend(new_block_ids)

    def _check_limits(self, step: SchedulerOutput) -> None:
        request_ids = [scheduled.request_id for scheduled in step.scheduled]
        assert len(set(request_ids)) == len(request_ids), "a request is scheduled twice"
        assert {new.request_id for new in step.new_requests} <= set(request_ids), (
            "new, not computed"
        )
        assert len(request_ids) <= self.max_batch_size, "more requests than max_batch_size"
        assert step.num_tokens <= self.max_num_tokens, "more tokens than max_num_tokens"
        assert all(scheduled.num_tokens >= 1 for scheduled in step.scheduled), "nothing to compute"

    def _check_writes(self, step: SchedulerOutput, group: int) -> None:
        # A block that is written in this step is in one block table alone.
        holders = Counter(
            block_id
            for sequence in self._sequences.values()
            for block_id in sequence.block_ids[group]
        )
        for scheduled in step.scheduled:
            block_ids = self._sequences[scheduled.request_id].block_ids[group]
            first = scheduled.num_computed_tokens // self.tokens_per_block
            last = (
                scheduled.num_computed_tokens + scheduled.num_tokens - 1
            ) // self.tokens_per_block
            assert last < len(block_ids), f"{scheduled.request_id}: the block table is too short"
            for block_id in block_ids[first : last + 1]:
                assert 0 <= block_id < len(self._caches[group]), f"there is no block {block_id}"
                assert holders[block_id] == 1, f"block {block_id} is written and shared"

    def _compute(self, scheduled: ScheduledRequest, output: ModelRunnerOutput) -> None:
        request_id, start = scheduled.request_id, scheduled.num_computed_tokens
        sequence, stop = self._sequences[request_id], start + scheduled.num_tokens
        assert not scheduled.draft_token_ids, "speculation is not implemented"
        assert stop <= len(sequence.token_ids), f"{request_id} has no tokens up to {stop}"
        values = [
            self._extend(cache, block_ids, sequence.token_ids, start, stop)
            for cache, block_ids in zip(self._caches, sequence.block_ids, strict=True)
        ]
        assert all(read == values[0] for read in values), "the KV groups disagree"
        if stop < len(sequence.token_ids):
            return
        if request_id in self.errors:
            output.errors[request_id] = self.errors[request_id]
            return
        token_id = _next_token(values[0], self.info.vocab_size)
        sequence.token_ids.append(token_id)
        output.token_ids[request_id] = [token_id]

    def _extend(
        self, cache: _Cache, block_ids: list[int], token_ids: list[int], start: int, stop: int
    ) -> list[bytes]:
        # Read the slots [0, start), write the slots [start, stop), return the values of all.
        values: list[bytes] = []
        for position, token_id in enumerate(token_ids[:stop]):
            block_id = block_ids[position // self.tokens_per_block]
            block, offset = cache[block_id], position % self.tokens_per_block
            if position >= start:
                value = _slot_value(values[-1] if values else b"", token_id, position)
                block[offset] = _Slot(token_id, position, value)
            slot = block[offset]
            assert slot is not None, f"block {block_id} was never written at position {position}"
            found, wanted = (slot.token_id, slot.position), (token_id, position)
            assert found == wanted, (
                f"block {block_id} holds (token, position) {found}, not {wanted}"
            )
            values.append(slot.value)
        return values
