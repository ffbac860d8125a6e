"""Refuses, before it is queued, what an engine can never serve.

It knows the limits it is given, and nothing of what is waiting or running.
"""

from __future__ import annotations

from llmserve.core.request import Request
from llmserve.errors import ContextLengthError, InvalidRequestError


def check_request(
    request: Request, *, max_seq_len: int, max_kv_tokens: int, max_prompt_tokens: int | None
) -> int:
    """Check one request against the engine's limits.

    Args:
        request: As submitted.
        max_seq_len: Longest prompt plus answer, in tokens.
        max_kv_tokens: Tokens that the empty KV cache holds for one request. The last token of an
            answer is sampled and never computed, so it takes no room there.
        max_prompt_tokens: Longest prompt in tokens, or None for no such limit.

    Returns:
        The most tokens, prompt and answer together, that the request may come to.

    Raises:
        InvalidRequestError: The prompt is empty or holds what is no token id, or the priority is
            not 0.
        ContextLengthError: The request can never fit.
    """
    prompt, max_tokens = request.prompt_token_ids, request.sampling_params.max_tokens
    if request.priority != 0:
        raise InvalidRequestError(
            f"priority is {request.priority}; only 0 is implemented", param="priority"
        )
    if not prompt:
        raise InvalidRequestError("the prompt is empty; it must have a token", param="prompt")
    if min(prompt) < 0 or max(prompt) >= 2**32:
        raise InvalidRequestError(
            f"the prompt has ids from {min(prompt)} to {max(prompt)}; they must be in [0, 2**32)",
            param="prompt",
        )
    if len(prompt) >= max_seq_len:
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens; with at least one token of answer it must fit "
            f"a context of {max_seq_len}",
            param="prompt",
        )
    if max_prompt_tokens is not None and len(prompt) > max_prompt_tokens:
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens; without chunked prefill it may have at most "
            f"{max_prompt_tokens}",
            param="prompt",
        )
    total = max_seq_len if max_tokens is None else len(prompt) + max_tokens
    asked = f"the prompt has {len(prompt)} tokens and max_tokens is {max_tokens}"
    if total > max_seq_len:
        raise ContextLengthError(
            f"{asked}; together they must fit a context of {max_seq_len}", param="max_tokens"
        )
    if total - 1 > max_kv_tokens:
        raise ContextLengthError(
            f"{asked}; the KV cache holds {max_kv_tokens} tokens", param="max_tokens"
        )
    return total
