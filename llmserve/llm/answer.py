"""Turns an engine's outputs for one sequence into the answer that a caller sees."""

from __future__ import annotations

from collections.abc import Sequence

from llmserve.core.request import FinishReason, Output, TokenLogprobs
from llmserve.core.sampling_params import SamplingParams
from llmserve.llm.outputs import CompletionOutput, Logprob
from llmserve.tokenizer import IncrementalDetokenizer, StopStringMatcher, Tokenizer


class Answer:
    """One sequence's tokens, text and end.

    Attributes:
        completion: What the caller sees; changed by ``update``.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        eos_token_ids: Sequence[int],
    ) -> None:
        self.completion = CompletionOutput(index=index)
        if params.logprobs is not None:
            self.completion.cumulative_logprob = 0.0
            self.completion.logprobs = []
            self.completion.logprobs_diff = []
        self._params = params
        self._prompt_token_ids = prompt_token_ids
        self._end_token_ids = frozenset((*eos_token_ids, *params.stop_token_ids))
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            prompt_token_ids=prompt_token_ids,
        )
        self._matcher = StopStringMatcher(
            params.stop, include_stop_str_in_output=params.include_stop_str_in_output
        )

    def clear_diffs(self) -> None:
        """A new step begins."""
        completion = self.completion
        if completion.token_ids_diff or completion.text_diff:
            completion.text_diff = ""
            completion.token_ids_diff = []
            if completion.logprobs is not None:
                completion.logprobs_diff = []

    def update(self, output: Output) -> None:
        """Take what a step brought. Afterwards ``completion.finish_reason`` may be 'stop' although
        the engine's sequence goes on: a stop string was found, and the engine cannot know."""
        completion = self.completion
        num_before = len(completion.token_ids)
        if output.prompt_logprobs is not None:
            completion.prompt_logprobs = [
                _logprobs(token_id, position)
                for token_id, position in zip(
                    self._prompt_token_ids[1:], output.prompt_logprobs, strict=True
                )
            ]
        text = self._add_tokens(output)
        if output.finish_reason is not None and self._matcher.matched is None:
            if self._params.detokenize:
                text += self._feed(self._detokenizer.flush()) + self._matcher.flush()
            completion.finish_reason = output.finish_reason.value
            completion.stop_reason = output.stop_reason
        if self._matcher.matched is not None:
            completion.finish_reason = "stop"
            completion.stop_reason = self._matcher.matched
        completion.text += text
        completion.text_diff += text
        completion.token_ids_diff += completion.token_ids[num_before:]

    def _add_tokens(self, output: Output) -> str:
        """Append tokens up to the one that completes a stop string; return their text."""
        pieces = []
        for i, token_id in enumerate(output.token_ids):
            self.completion.token_ids.append(token_id)
            if output.logprobs is not None:
                self._add_logprobs(token_id, output.logprobs[i])
            # Like a stop string, a token that ends an answer is no part of its text. One that ends
            # with a token of its text is an answer which matches what it must, and can't go on.
            is_stop_token = (
                output.finish_reason is FinishReason.STOP
                and i == len(output.token_ids) - 1
                and token_id in self._end_token_ids
            )
            if not self._params.detokenize or (
                is_stop_token and not self._params.include_stop_str_in_output
            ):
                continue
            pieces.append(self._feed(self._detokenizer.feed(token_id)))
            if self._matcher.matched is not None:
                break
        return "".join(pieces)

    def _feed(self, text: str) -> str:
        enough = len(self.completion.token_ids) >= self._params.min_tokens
        return self._matcher.feed(text, may_end=enough)

    def _add_logprobs(self, token_id: int, position: TokenLogprobs) -> None:
        completion = self.completion
        assert completion.logprobs is not None
        assert completion.logprobs_diff is not None
        assert completion.cumulative_logprob is not None
        alternatives = _logprobs(token_id, position)
        completion.logprobs.append(alternatives)
        completion.logprobs_diff.append(alternatives)
        completion.cumulative_logprob += position.logprob


def _logprobs(token_id: int, position: TokenLogprobs) -> dict[int, Logprob]:
    """A position by token id: the likeliest tokens first, then its own if it is none of them."""
    alternatives = {
        top_id: Logprob(logprob, rank)
        for rank, (top_id, logprob) in enumerate(
            zip(position.top_token_ids, position.top_logprobs, strict=True), start=1
        )
    }
    alternatives.setdefault(token_id, Logprob(position.logprob, position.rank))
    return alternatives
