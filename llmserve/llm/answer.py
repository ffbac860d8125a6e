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
    ) -> None:
        self.completion = CompletionOutput(index=index)
        if params.logprobs is not None:
            self.completion.cumulative_logprob = 0.0
            self.completion.logprobs = []
            self.completion.logprobs_diff = []
        self._params = params
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
        text = self._add_tokens(output)
        if output.finish_reason is not None and self._matcher.matched is None:
            if self._params.detokenize:
                text += self._matcher.feed(self._detokenizer.flush()) + self._matcher.flush()
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
            # Like a stop string, the token that ends an answer is no part of its text.
            is_stop_token = output.finish_reason is FinishReason.STOP and (
                i == len(output.token_ids) - 1
            )
            if not self._params.detokenize or (
                is_stop_token and not self._params.include_stop_str_in_output
            ):
                continue
            pieces.append(self._matcher.feed(self._detokenizer.feed(token_id)))
            if self._matcher.matched is not None:
                break
        return "".join(pieces)

    def _add_logprobs(self, token_id: int, position: TokenLogprobs) -> None:
        completion = self.completion
        assert completion.logprobs is not None
        assert completion.logprobs_diff is not None
        assert completion.cumulative_logprob is not None
        alternatives = {
            top_id: Logprob(logprob, rank)
            for rank, (top_id, logprob) in enumerate(
                zip(position.top_token_ids, position.top_logprobs, strict=True), start=1
            )
        }
        alternatives.setdefault(token_id, Logprob(position.logprob, position.rank))
        completion.logprobs.append(alternatives)
        completion.logprobs_diff.append(alternatives)
        completion.cumulative_logprob += position.logprob
