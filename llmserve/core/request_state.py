"""What the scheduler keeps of one request: its tokens, how far they are computed, when it ends.

It knows neither other requests nor blocks; its KV sequence is passed through unopened.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmserve.core.kv_cache_manager import KVSequence
from llmserve.core.request import FinishReason, Output, Request, TokenLogprobs
from llmserve.core.step import NewRequest
from llmserve.errors import EngineError


@dataclass(slots=True, eq=False)
class RequestState:
    """One request on its way through the scheduler.

    Attributes:
        request: As submitted.
        max_total_tokens: Prompt and answer may come to this many tokens.
        arrival_s: When it was added, on the scheduler's clock.
        token_ids: Prompt and accepted tokens.
        sequence: Its KV blocks.
        num_computed_tokens: Tokens whose KV is in the cache.
        num_prefill_tokens: Tokens there were at its (latest) start; up to here it is a prefill.
        num_preemptions: How often it was paused.
        num_cached_tokens: Prompt tokens found in the cache at its first start.
        queue_s: Seconds from arrival to its first start; None before that.
        finish_reason: Set once, when it ends.
        stop_reason: The one of ``stop_token_ids`` that ended it.
    """

    request: Request
    max_total_tokens: int
    arrival_s: float
    token_ids: list[int]
    sequence: KVSequence
    num_computed_tokens: int = 0
    num_prefill_tokens: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    queue_s: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    _eos_token_ids: frozenset[int] = field(init=False)
    _stop_token_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        params = self.request.sampling_params
        self._eos_token_ids = frozenset(() if params.ignore_eos else self.request.eos_token_ids)
        self._stop_token_ids = frozenset(params.stop_token_ids)

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens the client sent."""
        return len(self.request.prompt_token_ids)

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled: 1 while decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_prefill(self) -> bool:
        """Whether its prompt (after a pause: all it had by then) is still being computed."""
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
            sequence_index=self.request.sequence_index,
        )

    def start(self, num_cached_tokens: int, now_s: float) -> bool:
        """It enters the batch with this much in the cache; return whether for the first time."""
        self.num_computed_tokens = num_cached_tokens
        self.num_prefill_tokens = len(self.token_ids)
        if self.queue_s is not None:
            return False
        self.queue_s = now_s - self.arrival_s
        self.num_cached_tokens = num_cached_tokens
        return True

    def pause(self) -> None:
        """It leaves the batch with its tokens and without their KV."""
        self.num_computed_tokens = 0
        self.num_preemptions += 1

    def advance(self, num_tokens: int, sampled: list[int]) -> list[int]:
        """Take in a step: ``num_tokens`` computed and, if they reached the end, what was sampled.

        Returns:
            The sampled tokens up to the one that ends the answer, now part of ``token_ids``.

        Raises:
            EngineError: Tokens were sampled from a step that did not reach the end, or none from
                one that did.
        """
        num_computed_tokens = self.num_computed_tokens + num_tokens
        samples = num_computed_tokens >= len(self.token_ids)
        if samples != bool(sampled):
            raise EngineError(
                f"the model runner sampled {len(sampled)} tokens for {self.request_id} with "
                f"{num_computed_tokens} of {len(self.token_ids)} tokens computed"
            )
        accepted = self._accept(sampled)
        # The newest token is not computed yet. Rejected draft tokens were, and are forgotten here.
        self.num_computed_tokens = min(num_computed_tokens, len(self.token_ids) - int(samples))
        return accepted

    def _accept(self, sampled: list[int]) -> list[int]:
        # A stop token wins over a limit that is reached with the same token.
        accepted: list[int] = []
        for token_id in sampled:
            accepted.append(token_id)
            if token_id in self._eos_token_ids:
                self.finish_reason = FinishReason.STOP
            elif token_id in self._stop_token_ids:
                self.finish_reason, self.stop_reason = FinishReason.STOP, token_id
            elif len(self.token_ids) + len(accepted) >= self.max_total_tokens:
                self.finish_reason = FinishReason.LENGTH
            if self.finish_reason is not None:
                break
        self.token_ids.extend(accepted)
        return accepted

    def output(
        self,
        token_ids: list[int] | None = None,
        logprobs: list[TokenLogprobs] | None = None,
        error: str | None = None,
    ) -> Output:
        """An output with these tokens and the request's present state."""
        return Output(
            request_id=self.request_id,
            token_ids=tuple(token_ids or ()),
            logprobs=None if logprobs is None else tuple(logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=error,
            num_cached_tokens=self.num_cached_tokens,
            queue_s=self.queue_s or 0.0,
        )
