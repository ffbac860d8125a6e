"""What an engine can never serve, told before it is queued.

Both sides of the process boundary ask the same question here: the parent, so that the client hears
at once, and the core, which owns the truth.
"""

from __future__ import annotations

from llmserve.core.request import Request
from llmserve.engine.engine import EngineInfo
from llmserve.errors import ContextLengthError, InvalidRequestError


def check_request(request: Request, info: EngineInfo) -> None:
    """Refuse a request that does not fit the engine.

    Raises:
        ContextLengthError: Prompt plus max_tokens is longer than max_seq_len.
        InvalidRequestError: An empty prompt, a token id outside the vocabulary, sampling without a
            seed, a priority.
    """
    prompt, params = request.prompt_token_ids, request.sampling_params
    if not prompt:
        raise InvalidRequestError("the prompt is empty; it needs a token", param="prompt")
    if params.seed is None and not params.greedy:
        raise InvalidRequestError("seed is None; it has to be drawn already", param="seed")
    if request.priority != 0:
        raise InvalidRequestError(
            f"priority is {request.priority}; only 0 is implemented", param="priority"
        )
    # No max_tokens: whatever the context has room for, at least one token.
    max_tokens = 1 if params.max_tokens is None else params.max_tokens
    total = len(prompt) + max_tokens
    if total > info.max_seq_len:
        raise ContextLengthError(
            f"This model's maximum context length is {info.max_seq_len} tokens, but {total} were "
            f"requested: {len(prompt)} in the prompt and {max_tokens} for the completion "
            "(max_tokens). Shorten the prompt or ask for fewer tokens.",
            param="prompt" if len(prompt) >= info.max_seq_len else "max_tokens",
        )
    lowest, highest = min(prompt), max(prompt)
    if lowest < 0 or highest >= info.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise InvalidRequestError(
            f"token id {wrong} is not in the vocabulary; ids are 0 to {info.vocab_size - 1}",
            param="prompt",
        )
