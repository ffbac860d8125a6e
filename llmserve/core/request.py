"""A request to an engine and what comes back, in token ids: plain data that crosses processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from llmserve.core.sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a request ended. Every request gets exactly one."""

    STOP = "stop"  # an end-of-sequence or stop token
    LENGTH = "length"  # max_tokens, or the context is full
    ABORT = "abort"  # the client went away or asked for it
    ERROR = "error"  # this request's fault or the engine's: ``Output.error`` says which
    TIMEOUT = "timeout"  # the request's own ``timeout_s`` has passed


INTERACTIVE_PRIORITY = 0
"""Of requests that somebody waits for."""
BATCH_PRIORITY = 10
"""Of jobs that take what interactive requests leave."""
MAX_PRIORITY = 100
"""Priorities are in [-100, 100]."""
DEFAULT_RETENTION_PRIORITY, MAX_RETENTION_PRIORITY = 35, 100
"""Of KV blocks, TensorRT-LLM's: 0 goes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate. n > 1 of an API request is n of these.

    Attributes:
        request_id: Unique among the requests of an engine.
        prompt_token_ids: At least one token.
        sampling_params: With ``max_tokens`` and ``seed`` set: the layer above resolves None.
        eos_token_ids: The model's end-of-sequence tokens; empty under ``ignore_eos``.
        sequence_index: Which of the n answers this is; part of the key of its random numbers.
        priority: Lower starts earlier and is paused later, -100 to 100.
        timeout_s: Seconds from submission after which it ends, wherever it is; None: never.
        cache_salt: Requests share KV blocks only under the same salt.
        retention_priority: Of its KV blocks once nobody holds them, 0 to 100: lower is evicted
            sooner.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    sequence_index: int = 0
    priority: int = INTERACTIVE_PRIORITY
    timeout_s: float | None = None
    cache_salt: str | None = None
    retention_priority: int = DEFAULT_RETENTION_PRIORITY


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: log-softmax in float32 of the model's logits.

    Attributes:
        logprob: Of the token that was drawn, or stands there in the prompt.
        rank: Its rank, 1 for the likeliest.
        top_token_ids: The k likeliest tokens, likeliest first.
        top_logprobs: Theirs, in the same order.
    """

    logprob: float
    rank: int
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(slots=True)
class Output:
    """What one step brought for one request. The last one of a request has a finish_reason.

    Not frozen, for a frozen one takes five times as long to make, and each running request gets one
    in every step; nobody changes it.

    Attributes:
        request_id: Whose this is.
        token_ids: The new tokens. The token that ended the answer is among them.
        logprobs: One per new token, if the request asked for them.
        finish_reason: None while the request runs.
        stop_reason: The stop token's id if one of ``stop_token_ids`` ended it; None for EOS.
        error: A sentence for a person, with finish_reason ERROR or TIMEOUT.
        num_cached_tokens: Prompt tokens whose KV was reused; set from the first output on.
        queue_s: Seconds from submission to the first step; set from the first output on.
        prompt_logprobs: One per token of the prompt but the first, if the request asked for them:
            with its first output.
    """

    request_id: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    queue_s: float = 0.0
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
