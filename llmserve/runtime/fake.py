"""A deterministic ModelRunner without a model, for tests of scheduling and of the engine around it.

Its "KV cache" is real in what matters: it is paged, and written, copied and read back through the
block tables that the scheduler sends. A slot holds a digest of its token and of everything before
it, as a layer's K and V do. Each step reads back every slot that attention would read, and a wrong
block table, a block handed on too early, a missing copy or a wrong ``num_computed_tokens`` raises
AssertionError on the spot. So the tokens are a function of the prompt and the answer so far alone
(``expected_tokens``). Of sampling parameters it knows ``logprobs`` and ``prompt_logprobs`` alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain

from llmserve.core.request import TokenLogprobs
from llmserve.core.step import KVGroupSpec, ModelRunnerOutput, NewRequest, SchedulerOutput
from llmserve.runtime.model_runner import ModelInfo, TokenMasks

BYTES_PER_BLOCK = 1024


def expected_tokens(
    prompt: Sequence[int],
    count: int,
    *,
    vocab_size: int = 256,
    allowed: Callable[[list[int]], Sequence[int]] | None = None,
) -> list[int]:
    """The ``count`` tokens that a FakeRunner generates after ``prompt``, however it is batched.

    ``allowed`` stands for masks: given the answer so far, the ids that may follow, ascending.
    """
    digests = _extend([], prompt)
    generated: list[int] = []
    for _ in range(count):
        vocab = range(vocab_size) if allowed is None else allowed(generated)
        generated.append(vocab[_hash(digests[-1]) % len(vocab)])
        _extend(digests, generated[-1:])
    return generated


def expected_prompt_logprobs(prompt: Sequence[int], k: int) -> list[TokenLogprobs]:
    """What a FakeRunner says of the tokens of ``prompt`` but the first, with ``k`` alternatives."""
    return _prompt_logprobs(prompt, _extend([], prompt), 0, len(prompt), k)


def _extend(digests: list[bytes], token_ids: Sequence[int]) -> list[bytes]:
    # Append the digests of tokens that follow: of each one, and everything before it.
    digest = digests[-1] if digests else b""
    for position, token_id in enumerate(token_ids, len(digests)):
        digest = blake2b(digest + b"%d@%d" % (token_id, position), digest_size=8).digest()
        digests.append(digest)
    return digests


def _hash(digest: bytes) -> int:
    return int.from_bytes(blake2b(digest, digest_size=8).digest(), "big")


def _logprobs(digest: bytes, token_id: int, k: int) -> TokenLogprobs:
    value = _hash(digest + b"%d" % token_id)
    top = [-(value >> 16) % 100 / 100 - i for i in range(k)]
    return TokenLogprobs(-(value % 1000) / 100, value % 50 + 1, tuple(range(k)), tuple(top))


def _prompt_logprobs(
    prompt: Sequence[int], digests: Sequence[bytes], start: int, stop: int, k: int
) -> list[TokenLogprobs]:
    # Of the prompt's tokens after those at [start, stop).
    last = min(stop, len(prompt) - 1)
    return [_logprobs(digests[i], prompt[i + 1], k) for i in range(start, last)]


_Cache = list[list[bytes | None]]  # by block id, then by offset in the block


@dataclass(slots=True)
class _Sequence:
    new: NewRequest
    token_ids: list[int]
    digests: list[bytes]  # one per token
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int = 0

    def append(self, token_ids: list[int]) -> None:
        self.token_ids += token_ids
        _extend(self.digests, token_ids)


@dataclass(slots=True)
class _Range:
    """What one request computes in a step: the tokens whose digests are [start, len(digests))."""

    request_id: str
    sequence: _Sequence
    start: int
    digests: list[bytes]
    drafts: list[int] = field(default_factory=list)


class FakeRunner:
    """Implements ModelRunner in plain Python, with optional delays and failures.

    Args:
        max_batch_size: Asserted for every step.
        max_num_tokens: Asserted for every step.
        max_seq_len: Asserted for every request.
        tokens_per_block: Tokens of one block.
        windows: A KV group each, with its own cache and block tables: its sliding window in tokens,
            or None. What lies before the window is not read.
        vocab_size: Generated ids are in [0, vocab_size).
        step_s: Seconds that each step takes, from ``launch`` on.
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
        windows: tuple[int | None, ...] = (None,),
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
                KVGroupSpec(layers=(group,), window=window, bytes_per_block=BYTES_PER_BLOCK)
                for group, window in enumerate(windows)
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
        self._end_s = 0.0

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
        self._end_s = time.monotonic() + self.step_s
        return scheduler_output

    def finish(self, handle: SchedulerOutput, masks: TokenMasks | None = None) -> ModelRunnerOutput:
        """Compute the step.

        Raises:
            AssertionError: The step breaks a rule of the protocol.
            RuntimeError: At ``fail_at_step``.
        """
        assert handle is self._under_way, "finish of a step that is not under way"
        self._under_way = None
        step, self.num_steps = self.num_steps, self.num_steps + 1
        if step == self.fail_at_step:
            raise RuntimeError(f"the fake runner fails at step {step}, as it was asked to")
        output = self._execute(handle, masks or {})
        while self.step_computes and time.monotonic() < self._end_s:
            pass
        time.sleep(max(0.0, self._end_s - time.monotonic()))
        return output

    def shutdown(self) -> None:
        """Drop the cache."""
        self._caches = []
        self._sequences = {}

    def _execute(self, step: SchedulerOutput, masks: TokenMasks) -> ModelRunnerOutput:
        self._check_limits(step)
        self._learn(step)
        ranges = [*self._decodes(step), *self._prefills(step)]
        for group, block_copies in enumerate(step.block_copies):
            self._copy(group, block_copies)
        for group in range(len(self._caches)):
            self._check_writes(ranges, group)
        for part in ranges:
            self._write(part)
        output = ModelRunnerOutput()
        for part in ranges:
            self._read(part)
            self._sample(part, masks, output)
        return output

    def _check_limits(self, step: SchedulerOutput) -> None:
        prefilled = [prefill.request_id for prefill in step.prefills]
        request_ids = {*step.decodes, *prefilled}
        assert len(request_ids) == step.num_requests, "a request is scheduled twice"
        assert {new.request_id for new in step.new_requests} <= {*prefilled}, "new, not computed"
        assert step.draft_token_ids.keys() <= {*step.decodes}, "drafts without a decode"
        assert len(request_ids) <= self.max_batch_size, "more requests than max_batch_size"
        assert step.num_tokens <= self.max_num_tokens, "more tokens than max_num_tokens"
        assert all(prefill.num_tokens >= 1 for prefill in step.prefills), "nothing to compute"

    def _learn(self, step: SchedulerOutput) -> None:
        for request_id in step.finished_request_ids:
            assert request_id in self._sequences, f"{request_id} ends and was never told of"
            del self._sequences[request_id]
        for new in step.new_requests:
            assert new.request_id not in self._sequences, f"{new.request_id} is known already"
            assert 0 < new.num_prompt_tokens <= len(new.token_ids) < self.info.max_seq_len
            self._sequences[new.request_id] = _Sequence(
                new,
                list(new.token_ids),
                _extend([], new.token_ids),
                tuple([] for _ in self._caches),
            )
        for request_id, new_block_ids in step.new_block_ids.items():
            tables = self._sequences[request_id].block_ids
            for block_ids, ids in zip(tables, new_block_ids, strict=True):
                block_ids.extend(ids)

    def _decodes(self, step: SchedulerOutput) -> Iterator[_Range]:
        for request_id in step.decodes:
            sequence = self._sequences[request_id]
            start = len(sequence.token_ids) - 1
            assert sequence.num_computed_tokens == start, f"{request_id} has more to compute first"
            drafts = step.draft_token_ids.get(request_id, [])
            assert start + len(drafts) < self.info.max_seq_len, f"{request_id} gets too long"
            yield _Range(
                request_id, sequence, start, _extend(list(sequence.digests), drafts), drafts
            )

    def _prefills(self, step: SchedulerOutput) -> Iterator[_Range]:
        for prefill in step.prefills:
            request_id, start = prefill.request_id, prefill.num_computed_tokens
            sequence, stop = self._sequences[request_id], start + prefill.num_tokens
            assert stop <= len(sequence.token_ids), f"{request_id} has no tokens up to {stop}"
            sequence.num_computed_tokens = start
            yield _Range(request_id, sequence, start, sequence.digests[:stop])

    def _copy(self, group: int, block_copies: list[tuple[int, int]]) -> None:
        cache = self._caches[group]
        holders = self._holders(group)
        sources = [list(cache[src]) for src, _ in block_copies]
        for (_, dst), source in zip(block_copies, sources, strict=True):
            assert holders[dst] == 1, f"block {dst} is copied to and in {holders[dst]} tables"
            cache[dst] = source

    def _check_writes(self, ranges: list[_Range], group: int) -> None:
        # A block that is written in this step is in one block table alone.
        holders = self._holders(group)
        for part in ranges:
            block_ids = part.sequence.block_ids[group]
            first = part.start // self.tokens_per_block
            last = (len(part.digests) - 1) // self.tokens_per_block
            assert last < len(block_ids), f"{part.request_id}: the block table is too short"
            for block_id in block_ids[first : last + 1]:
                assert 0 <= block_id < len(self._caches[group]), f"there is no block {block_id}"
                assert holders[block_id] == 1, f"block {block_id} is written and shared"

    def _holders(self, group: int) -> Counter[int]:
        # In how many tables each block is, without those that a window has passed over.
        return Counter(
            chain.from_iterable(
                sequence.block_ids[group][
                    self._first_read(group, sequence.num_computed_tokens) // self.tokens_per_block :
                ]
                for sequence in self._sequences.values()
            )
        )

    def _first_read(self, group: int, position: int) -> int:
        # The first position that the token at ``position`` sees.
        window = self.info.kv_groups[group].window
        return 0 if window is None else max(0, position - window + 1)

    def _write(self, part: _Range) -> None:
        for cache, block_ids in zip(self._caches, part.sequence.block_ids, strict=True):
            for position in range(part.start, len(part.digests)):
                block, offset = divmod(position, self.tokens_per_block)
                cache[block_ids[block]][offset] = part.digests[position]

    def _read(self, part: _Range) -> None:
        size, stop = self.tokens_per_block, len(part.digests)
        for group, (cache, block_ids) in enumerate(
            zip(self._caches, part.sequence.block_ids, strict=True)
        ):
            first = self._first_read(group, part.start)
            for block in range(first // size, -(-stop // size)):
                start, end = max(first, block * size), min(stop, (block + 1) * size)
                found = cache[block_ids[block]][start - block * size : end - block * size]
                assert found == part.digests[start:end], (
                    f"block {block_ids[block]} of KV group {group} does not hold the tokens "
                    f"[{start}, {end}) of {part.request_id}, or not after the same tokens"
                )

    def _sample(self, part: _Range, masks: TokenMasks, output: ModelRunnerOutput) -> None:
        request_id, sequence = part.request_id, part.sequence
        new, params = sequence.new, sequence.new.sampling_params
        sequence.num_computed_tokens = len(part.digests)
        if params.prompt_logprobs is not None and part.start < new.num_prompt_tokens:
            output.prompt_logprobs[request_id] = _prompt_logprobs(
                new.token_ids[: new.num_prompt_tokens],
                part.digests,
                part.start,
                len(part.digests),
                params.prompt_logprobs,
            )
        if len(part.digests) < len(sequence.token_ids):  # a chunk
            return
        num_known_tokens = len(sequence.token_ids)
        sequence.append(self._sampled_tokens(part, masks))
        token_ids = sequence.token_ids[num_known_tokens:]
        sequence.num_computed_tokens = len(sequence.token_ids) - 1  # back over rejected drafts
        if request_id in self.errors:
            output.errors[request_id] = self.errors[request_id]
            return
        output.token_ids[request_id] = token_ids
        if params.logprobs is not None:
            digests = sequence.digests[num_known_tokens - 1 :]
            output.logprobs[request_id] = [
                _logprobs(digest, token_id, params.logprobs)
                for digest, token_id in zip(digests, token_ids, strict=False)
            ]

    def _sampled_tokens(self, part: _Range, masks: TokenMasks) -> list[int]:
        # After the newest token and, as long as it is what was sampled, after each guess.
        vocab: Sequence[int] = range(self.info.vocab_size)
        mask = masks.get(part.request_id)
        if mask is not None:
            assert not part.drafts, "a mask is for one token"
            words = mask.tolist()
            vocab = [i for i in vocab if words[i // 32] >> (i % 32) & 1]
            assert vocab, f"no token is allowed for {part.request_id}"
        token_ids: list[int] = []
        for digest in part.digests[len(part.sequence.token_ids) - 1 :]:
            token_ids.append(vocab[_hash(digest) % len(vocab)])
            if token_ids != part.drafts[: len(token_ids)]:
                break
        return token_ids
