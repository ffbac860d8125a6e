"""The messages between scheduler and model runner: what to compute in one step, and what came out.

All of it is plain data (ints, strings, lists), so it can be sent to another process, and it is
incremental: a request's prompt and block table are sent once, then only what is new.

A step computes tokens of requests in two ways. A *prefill* computes a range of known tokens::

    0 ............ num_computed_tokens ........ num_computed_tokens + num_tokens ...... len(tokens)
    [ KV is in the cache            ) [ this step computes these         ) [ later steps (chunked) )

One that reaches ``len(tokens)`` samples the next token; one that does not (a chunk) samples
nothing. A *decode* computes the newest token, which may still be being sampled by the step before
and never needs to leave the device, and samples the one after it. Behind it may stand draft tokens,
guesses that the step verifies: it samples after each of them, and accepts the guesses that agree
with what was sampled before them, and one more token::

    known tokens              newest   draft 0   draft 1   draft 2
    computed before        )  [ this step computes these          )
    samples                       a        b         c         d
    draft 0 == a, draft 1 != b:   a        b    <- two tokens are accepted; the KV of draft 1 and
                                                   draft 2 is written over by later steps

Steps are executed in the order of their launch, one after the other: whatever a step writes, later
ones read. So a block that a request gives back may be handed to another at once: a step under way
that still writes it is done before the other's first step begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from llmserve.core.request import TokenLogprobs
from llmserve.core.sampling_params import SamplingParams

BlockIds: TypeAlias = tuple[list[int], ...]
"""Block ids per KV group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroupSpec:
    """A set of layers that share one block table.

    Attributes:
        layers: Layer indices.
        window: Sliding window in tokens, or None for full attention.
        bytes_per_block: K and V of one block over all of these layers.
    """

    layers: tuple[int, ...]
    window: int | None
    bytes_per_block: int


@dataclass(slots=True, kw_only=True)
class NewRequest:
    """A request that the runner does not know (yet, or any more after a preemption).

    Attributes:
        request_id: The request.
        token_ids: The prompt, and after a preemption what was generated already.
        num_prompt_tokens: How many of them are the prompt (penalties tell them apart).
        sampling_params: With seed set.
        eos_token_ids: Not drawn before ``min_tokens``.
        sequence_index: Part of the key of the random numbers.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling_params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    sequence_index: int = 0


@dataclass(slots=True, kw_only=True)
class ScheduledPrefill:
    """A range of a request's known tokens to compute.

    Attributes:
        request_id: The request.
        num_computed_tokens: Where the range begins: tokens whose KV is in the cache.
        num_tokens: How long it is.
    """

    request_id: str
    num_computed_tokens: int
    num_tokens: int


@dataclass(slots=True, kw_only=True)
class SchedulerOutput:
    """One step. The runner works through it in the order of the fields.

    Attributes:
        step_id: Counts up from 0.
        finished_request_ids: Forget these: finished, aborted or paused.
        new_requests: Learn these.
        new_block_ids: By request, per KV group: blocks to append to its block table. A new
            request's whole table comes here, reused prefix blocks first; where a sliding window
            has passed over a block, any id stands in its place, and is never read.
        block_copies: Per KV group, (src, dst) block ids to copy before computing, in every layer of
            the group; all sources are read before any destination is written.
        decodes: Requests that compute their newest token.
        draft_token_ids: By request, for some of ``decodes``: guesses to verify behind it.
        prefills: Ranges to compute.
    """

    step_id: int
    finished_request_ids: list[str] = field(default_factory=list)
    new_requests: list[NewRequest] = field(default_factory=list)
    new_block_ids: dict[str, BlockIds] = field(default_factory=dict)
    block_copies: tuple[list[tuple[int, int]], ...] = ()
    decodes: list[str] = field(default_factory=list)
    draft_token_ids: dict[str, list[int]] = field(default_factory=dict)
    prefills: list[ScheduledPrefill] = field(default_factory=list)

    @property
    def num_requests(self) -> int:
        """Requests that compute something in this step."""
        return len(self.decodes) + len(self.prefills)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step over all requests, drafts included."""
        drafts = sum(map(len, self.draft_token_ids.values()))
        return len(self.decodes) + drafts + sum(prefill.num_tokens for prefill in self.prefills)


@dataclass(slots=True, kw_only=True)
class ModelRunnerOutput:
    """What a step brought, by request id.

    Attributes:
        token_ids: Accepted tokens of each request that sampled: one, or several where drafts were
            verified. A prefill chunk that is not the last has no entry.
        logprobs: One per token, only for requests that asked.
        prompt_logprobs: For prefills of requests that asked: of the tokens after those computed, as
            far as they are the prompt's. All chunks' together are those of all prompt tokens but
            the first.
        errors: A sentence for each request that failed on its own (NaN logits, say); it gets no
            tokens, the others are undisturbed.
    """

    token_ids: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
