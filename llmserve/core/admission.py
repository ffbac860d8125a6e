"""Refuses, before it is queued, what an engine can never serve.

It knows the limits it is given, and nothing of what is waiting or running. Every side that takes
requests asks here: the scheduler, and through ``engine/admission.py`` the layers above it, so that
a client hears at once.
"""

from __future__ import annotations

from llmserve.core.request import MAX_PRIORITY, MAX_RETENTION_PRIORITY, Request
from llmserve.errors import ContextLengthError, InvalidRequestError


def check_request(
    request: Request,
    *,
    max_seq_len: int,
    max_kv_tokens: int,
    max_prompt_tokens: int | None = None,
    vocab_size: int = 2**32,
) -> int:
    """Check one request against the engine's limits.

    Args:
        request: As submitted.
        max_seq_len: Longest prompt plus answer, in tokens.
        max_kv_tokens: Tokens that the empty KV cache holds for one request. The last token of an
            answer is sampled and never computed, so it takes no room there.
        max_prompt_tokens: Longest prompt in tokens, or None for no such limit.
        vocab_size: Token ids are in [0, vocab_size).

    Returns:
        The most tokens, prompt and answer together, that the request may come to.

    Raises:
        InvalidRequestError: The prompt is empty or has an id outside the vocabulary, the seed is
            not drawn yet, or a priority or the timeout is out of its range.
        ContextLengthError: The request can never fit.
    """
    prompt, params = request.prompt_token_ids, request.sampling_params
    _check_range("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
    _check_range("retention_priority", request.retention_priority, 0, MAX_RETENTION_PRIORITY)
    if request.timeout_s is not None and not request.timeout_s > 0:
        raise InvalidRequestError(
            f"timeout is {request.timeout_s}; it must be > 0", param="timeout"
        )
    if params.seed is None and not params.greedy:
        raise InvalidRequestError("seed is None; it has to be drawn already", param="seed")
    if not prompt:
        raise InvalidRequestError("the prompt is empty; it needs a token", param="prompt")
    lowest, highest = min(prompt), max(prompt)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise InvalidRequestError(
            f"token id {wrong} is not in the vocabulary; ids are 0 to {vocab_size - 1}",
            param="prompt",
        )
    # No max_tokens: whatever the context has room for, at least one token.
    max_tokens = 1 if params.max_tokens is None else params.max_tokens
    asked = (
        f"{len(prompt) + max_tokens} were requested: {len(prompt)} in the prompt and {max_tokens} "
        "for the completion (max_tokens). Shorten the prompt or ask for fewer tokens."
    )
    if len(prompt) + max_tokens > max_seq_len:
        raise ContextLengthError(
            f"This model's maximum context length is {max_seq_len} tokens, but {asked}",
            param="prompt" if len(prompt) >= max_seq_len else "max_tokens",
        )
    if max_prompt_tokens is not None and len(prompt) > max_prompt_tokens:
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens; without chunked prefill it may have at most "
            f"{max_prompt_tokens}",
            param="prompt",
        )
    total = max_seq_len if params.max_tokens is None else len(prompt) + max_tokens
    if total - 1 > max_kv_tokens:
        raise ContextLengthError(
            f"The KV cache holds {max_kv_tokens} tokens, but {asked}", param="max_tokens"
        )
    return total


def _check_range(param: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InvalidRequestError(
            f"{param} is {value}; it must be in [{least}, {most}]", param=param
        )
