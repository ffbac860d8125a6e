"""Its executor: a thread that makes steps for all requests at once."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from tensorrt_llm._behaviour import behaviour
from tensorrt_llm._params import SamplingParams
from tensorrt_llm._result import IterationResult, Logprob, RequestOutput, Response

from llmserve.runtime.fake import expected_tokens


def answer(
    inputs: list[int], params: SamplingParams, vocab_size: int, sequence: int = 0
) -> list[int]:
    """The tokens of a request, as long as it may get."""
    greedy = params.runtime_greedy
    prompt = inputs if greedy else [*inputs, ((params.seed or 0) + sequence) % vocab_size]
    assert params.max_tokens is not None
    return expected_tokens(prompt, params.max_tokens, vocab_size=vocab_size)


def position(token_id: int, k: int, vocab_size: int) -> dict[int, Logprob]:
    """Log-probabilities of a position; a token that 3 divides is not among the k likeliest."""
    own = -1.0 - token_id % 8
    if token_id % 3:
        others = {(token_id + i) % vocab_size: Logprob(own - i, i + 1) for i in range(k)}
        return others | {token_id: Logprob(own, 1)}
    others = {(token_id + i) % vocab_size: Logprob(own / (i + 1), 0) for i in range(k, 0, -1)}
    ranked = {
        other: Logprob(value.logprob, i) for i, (other, value) in enumerate(others.items(), 1)
    }
    return ranked | {token_id: Logprob(own, k + 5)}


@dataclass
class _Active:
    result: RequestOutput
    params: SamplingParams
    answers: list[list[int]]
    streaming: bool
    num_tokens: int = 0
    num_steps: int = 0
    unsent: list[Response] = field(default_factory=list)


class Executor:
    """Makes steps while there are requests.

    Args:
        vocab_size: Tokens are in [0, vocab_size).
        leaves_end_id_out: As TensorRT engines do.
        max_batch_size: Most requests in one step.
        num_blocks: Blocks of the KV cache.
        tokens_per_block: Tokens of one.
        tells_statistics: Whether iterations are told.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        leaves_end_id_out: bool,
        max_batch_size: int,
        num_blocks: int,
        tokens_per_block: int,
        tells_statistics: bool,
    ) -> None:
        self.vocab_size = vocab_size
        self.leaves_end_id_out = leaves_end_id_out
        self.max_batch_size = max_batch_size
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.tells_statistics = tells_statistics
        self.statistics: IterationResult | None = None
        self.num_steps = 0
        self.num_sequences = 0
        self.stopped = False
        self._active: dict[int, _Active] = {}
        self._aborted: set[int] = set()
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="standin", daemon=True)
        self._thread.start()

    def submit(self, inputs: list[int], params: SamplingParams, streaming: bool) -> RequestOutput:
        if self.statistics is None:
            self.statistics = IterationResult()
        self.statistics.done = False
        with self._condition:
            self.num_sequences += params.n
            result = RequestOutput(self, self.num_sequences, inputs, params)
            answers = [answer(inputs, params, self.vocab_size, i) for i in range(params.n)]
            self._active[result.request_id] = _Active(result, params, answers, streaming)
            self._condition.notify()
        return result

    def context_logits(self, inputs: list[int]) -> Any:
        """Logits of a prompt, (tokens, vocabulary), in the model's dtype."""
        import torch

        ids = torch.arange(self.vocab_size)
        rows = [-((ids * 7 + token_id) % 13) - ids / 512 for token_id in inputs]
        return torch.stack(rows).bfloat16()

    def abort(self, request_id: int) -> None:
        with self._condition:
            self._aborted.add(request_id)
            self._condition.notify()

    def stop(self) -> None:
        """Abort everything and say nothing more."""
        with self._condition:
            self.stopped = True
            self._condition.notify()

    def join(self) -> None:
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self.stopped or self._active)
                if self.stopped:
                    return
            threading.Event().wait(behaviour.step_s)
            behaviour.running.wait()
            with self._condition:
                if self.stopped:
                    return
                self._step()

    def _step(self) -> None:
        if behaviour.die_at_step is not None and self.num_steps >= behaviour.die_at_step:
            for active in self._active.values():
                active.result.send(Response(error=RuntimeError("CUDA error: an illegal access")))
            self._active.clear()
            self.stopped = True
            return
        for request_id in self._aborted & self._active.keys():
            active = self._active.pop(request_id)
            if not behaviour.lose_aborts:
                active.result.send(Response(final=True, finish_reason="cancelled"))
        scheduled = list(self._active)[: self.max_batch_size]
        for request_id in scheduled:
            self._advance(request_id, self._active[request_id])
        self._tell(len(scheduled))
        self.num_steps += 1

    def _advance(self, request_id: int, active: _Active) -> None:
        prompt = tuple(active.result.prompt_token_ids)
        if active.num_steps == 1 and prompt in behaviour.request_errors:
            del self._active[request_id]
            active.result.send(Response(error=behaviour.request_errors[prompt]))
            return
        responses = [
            self._next(active, sequence, tokens) for sequence, tokens in enumerate(active.answers)
        ]
        active.num_steps += 1
        active.num_tokens += behaviour.tokens_per_step
        if active.streaming:
            for response in responses:
                active.result.send(response)
        else:
            active.unsent += responses
        if responses[0].final:
            del self._active[request_id]
            for response in active.unsent:
                active.result.send(response)

    def _next(self, active: _Active, sequence: int, tokens: list[int]) -> Response:
        params, response = active.params, Response(sequence=sequence)
        stop = active.num_tokens + behaviour.tokens_per_step
        for token_id in tokens[active.num_tokens : stop]:
            is_end = token_id == params.end_id and not params.ignore_eos
            if not (is_end and self.leaves_end_id_out):
                response.token_ids.append(token_id)
                if params.logprobs:
                    response.logprobs.append(position(token_id, params.logprobs, self.vocab_size))
            if is_end:
                response.final, response.finish_reason = True, "stop"
                return response
            # 1.3 takes no stop tokens under ignore_eos.
            stops = self.leaves_end_id_out or not params.ignore_eos
            if stops and token_id in (params.stop_token_ids or ()):
                response.final, response.finish_reason = True, "stop"
                response.stop_reason = token_id
                return response
        if stop >= len(tokens):
            response.final, response.finish_reason = True, behaviour.finish_reason
        return response

    def _tell(self, num_scheduled: int) -> None:
        if not self.tells_statistics or self.statistics is None:
            return
        used = min(len(self._active), self.num_blocks)
        self.statistics.send(
            {
                "iter": self.num_steps,
                "iterLatencyMS": 12.5,
                "numActiveRequests": len(self._active),
                "numQueuedRequests": 0,
                "inflightBatchingStats": {
                    "numScheduledRequests": num_scheduled,
                    "numContextRequests": 0,
                    "numGenRequests": num_scheduled,
                    "numPausedRequests": 0,
                    "numCtxTokens": 0,
                    "avgNumDecodedTokensPerIter": float(behaviour.tokens_per_step),
                },
                "kvCacheStats": {
                    "maxNumBlocks": self.num_blocks,
                    "freeNumBlocks": self.num_blocks - used,
                    "usedNumBlocks": used,
                    "tokensPerBlock": self.tokens_per_block,
                    "allocNewBlocks": used,
                    "allocTotalBlocks": used,
                    "reusedBlocks": self.num_sequences // 2,
                    "missedBlocks": self.num_sequences,
                    "cacheHitRate": 0.5,
                },
            }
        )
