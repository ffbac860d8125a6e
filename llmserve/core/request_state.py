"""What is kept of one request: its tokens, how far they are computed, when it ends.

It knows neither other requests nor blocks; its KV sequence is passed through unopened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmserve.core.constraint import TokenConstraint
from llmserve.core.kv_cache_manager import KVSequence
from llmserve.core.request import FinishReason, Output, Request, TokenLogprobs
from llmserve.core.step import NewRequest


@dataclass(slots=True, eq=False)
class RequestState:
    """One request on its way through the scheduler.

    Attributes:
        request: As submitted.
        max_total_tokens: Prompt and answer may come to this many tokens.
        arrival_s: When it was added, on the scheduler's clock.
        token_ids: Prompt and accepted tokens.
        sequence: Its KV blocks.
        constraint: What its answer has to match, or None.
        request_id: The request's id.
        rank: Its priority, or a better one since it was its turn.
        start_number: Counts starts; orders the running ones of a rank.
        running: Whether it is in the batch.
        num_computed_tokens: Tokens whose KV is in the cache once all steps under way are done:
            where the next one begins.
        num_prefill_tokens: Tokens there were at its (latest) start; up to here it is a prefill.
        checkpoint: While it decodes: up to here the scheduler only has to count on.
        boundary: While it decodes: number of tokens at which more is to be done than to append: a
            block is full, or the answer.
        num_preemptions: How often it was paused.
        paused_at: The last step that was under way when it was paused.
        num_cached_tokens: Prompt tokens found in the cache at its first start.
        queue_s: Seconds from arrival to its first start; None before that.
        prompt_logprobs: Gathered until they are whole and put out; None if none are wanted.
        finish_reason: Set once, when it ends.
        stop_reason: The one of ``stop_token_ids`` that ended it.
        end_token_ids: All tokens that end it.
    """

    request: Request
    max_total_tokens: int
    arrival_s: float
    token_ids: list[int]
    sequence: KVSequence
    constraint: TokenConstraint | None = None
    request_id: str = field(init=False)
    rank: int = field(init=False)
    start_number: int = 0
    running: bool = False
    num_computed_tokens: int = 0
    num_prefill_tokens: int = 0
    checkpoint: int = 0
    boundary: int = 0
    num_preemptions: int = 0
    paused_at: int = -1
    num_cached_tokens: int = 0
    queue_s: float | None = None
    prompt_logprobs: list[TokenLogprobs] | None = field(init=False)
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    end_token_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        params = self.request.sampling_params
        self.request_id = self.request.request_id
        self.rank = self.request.priority
        self.prompt_logprobs = None if params.prompt_logprobs is None else []
        self.end_token_ids = frozenset((*self._eos_token_ids, *params.stop_token_ids))

    @property
    def _eos_token_ids(self) -> tuple[int, ...]:
        ignored = self.request.sampling_params.ignore_eos
        return () if ignored else self.request.eos_token_ids

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens the client sent."""
        return len(self.request.prompt_token_ids)

    @property
    def is_prefill(self) -> bool:
        """Whether some of its prompt (after a pause: of all it had by then) is still to compute."""
        return self.num_computed_tokens < self.num_prefill_tokens

    @property
    def max_kv_tokens(self) -> int:
        """Most tokens that ever lie in the KV cache: the last one is sampled, never computed."""
        return self.max_total_tokens - 1

    def as_new(self) -> NewRequest:
        """How the runner learns of it: with all of its tokens."""
        return NewRequest(
            request_id=self.request_id,
            token_ids=list(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            sampling_params=self.request.sampling_params,
            eos_token_ids=self._eos_token_ids,
            sequence_index=self.request.sequence_index,
        )

    def start(self, num_cached_tokens: int, now_s: float) -> bool:
        """It enters the batch with this much in the cache; return whether for the first time."""
        self.running = True
        self.num_computed_tokens = num_cached_tokens
        self.num_prefill_tokens = len(self.token_ids)
        if self.prompt_logprobs:
            self.prompt_logprobs = []  # what a pause cut off comes again, from the beginning
        if self.queue_s is not None:
            return False
        self.queue_s = now_s - self.arrival_s
        self.num_cached_tokens = num_cached_tokens
        return True

    def pause(self, step_id: int) -> None:
        """It leaves the batch with its tokens and without their KV; a step may still be under way
        that brings it one more.
        """
        self.num_computed_tokens = self.checkpoint = 0
        self.num_preemptions += 1
        self.paused_at = step_id

    def accept(self, sampled: Sequence[int]) -> list[int]:
        """Append sampled tokens, up to the one that ends the answer; return those appended."""
        # A stop token wins over a limit that is reached with the same token.
        accepted: list[int] = []
        for token_id in sampled:
            accepted.append(token_id)
            if token_id in self.end_token_ids:
                self.finish_reason = FinishReason.STOP
                if token_id not in self._eos_token_ids:
                    self.stop_reason = token_id
            elif self.constraint is not None and self.constraint.accept(token_id):
                self.finish_reason = FinishReason.STOP
            elif len(self.token_ids) + len(accepted) >= self.max_total_tokens:
                self.finish_reason = FinishReason.LENGTH
            if self.finish_reason is not None:
                break
        self.token_ids.extend(accepted)
        return accepted

    def output(
        self,
        token_ids: Sequence[int] = (),
        logprobs: Sequence[TokenLogprobs] | None = None,
        error: str | None = None,
    ) -> Output:
        """An output with these tokens and the request's present state."""
        prompt_logprobs = self.prompt_logprobs
        if prompt_logprobs is not None:
            if len(prompt_logprobs) < self.num_prompt_tokens - 1:
                prompt_logprobs = None
            else:
                self.prompt_logprobs = None
        return Output(
            self.request_id,
            token_ids,
            logprobs,
            self.finish_reason,
            self.stop_reason,
            error,
            self.num_cached_tokens,
            self.queue_s or 0.0,
            prompt_logprobs,
        )
