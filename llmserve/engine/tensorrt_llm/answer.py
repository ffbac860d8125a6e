"""What a step has changed in NVIDIA's result of one request, as Outputs of ours.

Its result is one object that changes at every step: all that is kept is copied, and what is new is
told from the lengths, since its own differences are only those of the last step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmserve.core.request import FinishReason, Output, Request, TokenLogprobs
from llmserve.engine.tensorrt_llm.sampling import NO_END_ID, end_tokens

_ENDS = {"length": FinishReason.LENGTH, "cancelled": FinishReason.ABORT}


class AnswerReader:
    """Reads one request's result, step after step.

    Attributes:
        num_tokens: Tokens read so far.
        num_cached_tokens: Prompt tokens whose KV was reused.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._end_id, _ = end_tokens(request)
        params = request.sampling_params
        self._eos_token_ids = frozenset(() if params.ignore_eos else request.eos_token_ids)
        self._enders = self._eos_token_ids | frozenset(params.stop_token_ids)
        self._num_logprobs = params.logprobs
        self._num_prompt_logprobs = params.prompt_logprobs
        self._prompt_is_read = False
        self._prompt_logprobs: list[TokenLogprobs] | None = None  # read, and not handed out yet
        self.num_tokens = 0
        self.num_cached_tokens = 0

    def read(self, result: Any) -> list[Output]:
        """What has come since the last call; the last Output has a finish_reason if it is over."""
        completion = result.outputs[0]
        self.num_cached_tokens = int(result.cached_tokens or 0)
        if self.reads_prompt_next(result):
            self._prompt_is_read = True
            try:
                self._prompt_logprobs = self._read_prompt(result.context_logits)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                sentence = f"TensorRT-LLM gave logits of the prompt that do not fit: {error!r}"
                return [self._output(finish_reason=FinishReason.ERROR, error=sentence)]
        token_ids = tuple(completion.token_ids[self.num_tokens :])
        logprobs = None
        if self._num_logprobs is not None:
            # More of them than tokens is known to happen, and the rest is dropped.
            positions = (completion.logprobs or [])[self.num_tokens :][: len(token_ids)]
            try:
                logprobs = tuple(
                    _logprobs(token_id, position, self._num_logprobs)
                    for token_id, position in zip(token_ids, positions, strict=True)
                )
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                sentence = f"TensorRT-LLM gave log-probabilities that do not fit: {error!r}"
                return [self._output(finish_reason=FinishReason.ERROR, error=sentence)]
        self.num_tokens += len(token_ids)
        if not result.finished:
            has_news = token_ids or self._prompt_logprobs is not None
            return [self._output(token_ids, logprobs)] if has_news else []
        return self._last(token_ids, logprobs, completion)

    def reads_prompt_next(self, result: Any) -> bool:
        """Whether ``read`` now has the logits of the whole prompt to work on, which is slow."""
        if self._num_prompt_logprobs is None or self._prompt_is_read:
            return False
        completion = result.outputs[0]
        ended = result.finished and completion.finish_reason != "cancelled"
        return bool(completion.token_ids) or ended

    def _read_prompt(self, logits: Any) -> list[TokenLogprobs]:
        """The prompt's log-probabilities, of its logits (tokens, vocabulary)."""
        import torch  # TensorRT-LLM has brought it

        token_ids = self._request.prompt_token_ids
        if logits.ndim != 2 or logits.shape[0] != len(token_ids):
            raise ValueError(f"shape {tuple(logits.shape)} for {len(token_ids)} tokens")
        k = self._num_prompt_logprobs or 0
        positions = []
        # Row by row: all of a long prompt's at once in float32 would be gigabytes.
        for row, token_id in zip(logits, token_ids[1:], strict=False):
            logprobs = torch.log_softmax(row.float(), dim=-1)
            top = logprobs.topk(k)
            positions.append(
                TokenLogprobs(
                    logprob=logprobs[token_id].item(),
                    rank=1 + int((logprobs > logprobs[token_id]).sum()),
                    top_token_ids=tuple(top.indices.tolist()),
                    top_logprobs=tuple(top.values.tolist()),
                )
            )
        return positions

    def _last(
        self,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...] | None,
        completion: Any,
    ) -> list[Output]:
        reason = completion.finish_reason
        if reason in _ENDS:
            return [self._output(token_ids, logprobs, finish_reason=_ENDS[reason])]
        if reason != "stop":
            error = f"TensorRT-LLM ended the request with reason {reason!r}"
            return [
                self._output(token_ids, logprobs, finish_reason=FinishReason.ERROR, error=error)
            ]
        outputs = []
        if token_ids and token_ids[-1] in self._enders:
            ended_by = token_ids[-1]
        else:
            # A TensorRT engine leaves its end_id out, where ours has the token that ended it.
            is_token = isinstance(completion.stop_reason, int)
            ended_by = completion.stop_reason if is_token else self._end_id
            if logprobs is None and ended_by != NO_END_ID:
                token_ids = (*token_ids, ended_by)
                self.num_tokens += 1
            else:
                # There is no log-probability of it: the end comes by itself, without a token.
                outputs = [self._output(token_ids, logprobs)] if token_ids else []
                token_ids, logprobs = (), None if logprobs is None else ()
        is_eos = ended_by == self._end_id or ended_by in self._eos_token_ids
        last = self._output(token_ids, logprobs, finish_reason=FinishReason.STOP)
        return [*outputs, replace(last, stop_reason=None if is_eos else ended_by)]

    def _output(
        self,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        *,
        finish_reason: FinishReason | None = None,
        error: str | None = None,
    ) -> Output:
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        return Output(
            request_id=self._request.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            error=error,
            num_cached_tokens=self.num_cached_tokens,
            prompt_logprobs=prompt_logprobs,
        )


def _logprobs(token_id: int, position: Mapping[int, Any], k: int) -> TokenLogprobs:
    """The k likeliest of a position, and the token's own, from ``{id: Logprob(logprob, rank)}``."""
    likeliest = sorted(position.items(), key=lambda item: -item[1].logprob)
    own = position[token_id]
    # PyTorch's sampler may leave the rank out: then it is the place among those that are there.
    rank = own.rank or 1 + sum(other.logprob > own.logprob for other in position.values())
    return TokenLogprobs(
        logprob=float(own.logprob),
        rank=int(rank),
        top_token_ids=tuple(top_id for top_id, _ in likeliest[:k]),
        top_logprobs=tuple(float(top.logprob) for _, top in likeliest[:k]),
    )
