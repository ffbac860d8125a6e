"""The messages between scheduler and model runner: what to compute in one step, and what came out.

All of it is plain data (ints, strings, lists), so it can be sent to another process, and it is
incremental: a request's prompt and block table are sent once, then only what is new.

Token ranges of a request, half open, as a step sees them::

    0 ............ num_computed_tokens ........ num_computed_tokens + num_tokens ...... len(tokens)
    [ KV is in the cache            ) [ this step computes these         ) [ later steps (chunked) )

A step that reaches ``len(tokens)`` samples the next token; one that does not (a prefill chunk)
samples nothing. ``num_computed_tokens`` is absolute, so that it can also go back (speculation).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmserve.core.request import TokenLogprobs
from llmserve.core.sampling_params import SamplingParams


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
        sequence_index: Part of the key of the random numbers.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling_params: SamplingParams
    sequence_index: int = 0


@dataclass(slots=True, kw_only=True)
class ScheduledRequest:
    """One request's share of a step.

    Attributes:
        request_id: The request.
        num_computed_tokens: Where this step begins: tokens whose KV is in the cache.
        num_tokens: How many tokens this step computes, draft tokens included.
        new_block_ids: Per KV group, blocks to append to the request's block table. A new request's
            whole table comes here, reused prefix blocks first.
        draft_token_ids: Guesses to verify; always empty until speculation.
    """

    request_id: str
    num_computed_tokens: int
    num_tokens: int
    new_block_ids: tuple[list[int], ...]
    draft_token_ids: list[int] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class SchedulerOutput:
    """One step. The runner works through it in the order of the fields.

    Attributes:
        step_id: Counts up from 0.
        finished_request_ids: Forget these: finished, aborted or preempted.
        new_requests: Learn these.
        block_copies: (src, dst) block ids to copy before computing, in every layer of group 0.
        scheduled: Compute these: decodes first, then prefills.
    """

    step_id: int
    finished_request_ids: list[str] = field(default_factory=list)
    new_requests: list[NewRequest] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    scheduled: list[ScheduledRequest] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step over all requests."""
        return sum(request.num_tokens for request in self.scheduled)


@dataclass(slots=True, kw_only=True)
class ModelRunnerOutput:
    """What a step brought, by request id.

    Attributes:
        token_ids: Accepted tokens of each request that sampled: one, or several with speculation.
            A prefill chunk that is not the last has no entry.
        logprobs: One per token, only for requests that asked.
        errors: A sentence for each request that failed on its own (NaN logits, say); it gets no
            tokens, the others are undisturbed.
    """

    token_ids: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
