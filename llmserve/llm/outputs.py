"""What a caller gets back, under TensorRT-LLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of a token at one position.

    Attributes:
        logprob: Log-softmax in float32 of the model's logits, before penalties and temperature.
        rank: 1 for the likeliest token of the vocabulary.
    """

    logprob: float
    rank: int


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One answer to a prompt, as far as it has come. The fields ``*_diff`` are the last step's.

    Attributes:
        index: Which of the n answers.
        text: The text so far: all ``text_diff`` joined. Never ends within a character, nor with
            what may still become a stop string.
        token_ids: The tokens so far, with the one that ended the answer.
        cumulative_logprob: Sum of the tokens' log-probabilities; None unless asked for logprobs.
        logprobs: Per token the log-probabilities by token id, the likeliest first; the token
            itself is always among them. None unless asked for.
        prompt_logprobs: The same for each token of the prompt but the first, there with the first
            step. None unless asked for.
        finish_reason: 'stop' (end-of-sequence, stop token or stop string), 'length' (max_tokens),
            'timeout' (the request's own has passed), 'abort' (TensorRT-LLM's 'cancelled'), or None
            while the answer goes on.
        stop_reason: The stop string or stop token id that ended the answer; None for an
            end-of-sequence token.
        text_diff: Text that the last step brought; empty if it brought nothing to this answer.
        token_ids_diff: Tokens that the last step brought.
        logprobs_diff: Theirs, or None unless asked for.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    text_diff: str = ""
    token_ids_diff: list[int] = field(default_factory=list)
    logprobs_diff: list[dict[int, Logprob]] | None = None

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.token_ids)


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """The answers to one prompt. A stream yields the same object at each step, changed.

    Attributes:
        request_id: As given by the caller.
        prompt: The prompt's text if it was given as text.
        prompt_token_ids: The prompt as the model sees it, after truncation.
        outputs: n answers, by index.
        finished: Every answer has its finish_reason; nothing more comes.
        cached_tokens: Prompt tokens that were not computed but taken from the KV cache.
        queue_s: Seconds from submission to the first step.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    cached_tokens: int = 0
    queue_s: float = 0.0
