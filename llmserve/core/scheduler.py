"""Decides which requests run in each step and how many tokens each: in-flight batching.

It owns the waiting queue and the running batch. It handles token counts and block ids, never
tensors, and knows neither the model nor who listens to the outputs. A step is three calls::

    scheduler_output = scheduler.schedule(now_s)
    runner_output = runner.finish(runner.launch(scheduler_output))
    outputs = scheduler.update_from_output(scheduler_output, runner_output)

The life of a request, and where its blocks are::

    add_request --> waiting --start--> running --stop, length, error--> gone (blocks freed)
                       ^                 |
                       +----- pause -----+      (blocks freed, tokens kept, recomputed later)

    abort_request ends it anywhere. In mid-step its blocks stay with the step and are freed by
    update_from_output, so that no other request is ever given a block which is being written.

Each step goes by TensorRT-LLM's rules. **Token budget** of max_num_tokens: decodes come first, in
the order of their start; prefills get what is left, first come first served, rounded down to whole
blocks where it does not suffice. The first that gets nothing ends the round: nobody behind it
starts, so what holds it up drains. **Capacity**: under guaranteed_no_evict a request starts only
if all blocks it may ever need fit beside what the running ones may still need; no running request
is ever paused. Under max_utilization it starts if the tokens it has now fit; when a running one
later finds no block, the last started at or behind it is paused and it tries again. So the first
started can always go on, and with it everything comes to its turn. **Reuse**: a waiting request
whose first missing block is computed by another one in this very step is put off, alone, to find
that block in the next step instead of computing it twice.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import islice

from llmserve.config import CapacitySchedulerPolicy
from llmserve.core.admission import check_request
from llmserve.core.kv_cache_manager import BlockIds, KVCacheManager
from llmserve.core.request import FinishReason, Output, Request
from llmserve.core.request_state import RequestState
from llmserve.core.stats import EngineStats
from llmserve.core.step import ModelRunnerOutput, ScheduledRequest, SchedulerOutput
from llmserve.errors import EngineError, EngineOverloadedError, InvalidRequestError


@dataclass(slots=True)
class _Step:
    """A step while it is being put together."""

    output: SchedulerOutput
    token_budget: int
    round_ended: bool = False  # someone got nothing: nobody may start behind them
    decodes: list[ScheduledRequest] = field(default_factory=list)
    prefills: list[ScheduledRequest] = field(default_factory=list)
    requests: dict[str, RequestState] = field(default_factory=dict)
    computed_keys: set[bytes] = field(default_factory=set)  # blocks that its prefills complete


class Scheduler:
    """First come, first served, in-flight batching over a paged KV cache.

    Args:
        max_batch_size: Most requests in the running batch.
        max_num_tokens: Most tokens computed in one step.
        max_seq_len: Longest prompt plus answer, in tokens.
        kv: The KV cache; nobody else may allocate from it.
        policy: guaranteed_no_evict or max_utilization.
        enable_chunked_prefill: Let a prefill be computed over several steps. Without it a prompt
            longer than max_num_tokens is refused; only what is recomputed after a pause, and has
            outgrown max_num_tokens, is still computed in chunks.
        max_queue_size: Most requests that may wait.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_num_tokens: int,
        max_seq_len: int,
        kv: KVCacheManager,
        policy: CapacitySchedulerPolicy,
        enable_chunked_prefill: bool,
        max_queue_size: int,
    ) -> None:
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.max_seq_len = max_seq_len
        self.policy = policy
        self.enable_chunked_prefill = enable_chunked_prefill
        self.max_queue_size = max_queue_size
        self.stats = EngineStats()
        self._kv = kv
        # A budget below one block would round every chunk down to nothing.
        self._chunk_unit_tokens = min(kv.tokens_per_block, max_num_tokens)
        self._requests: dict[str, RequestState] = {}  # all unfinished ones
        self._waiting: deque[RequestState] = deque()  # paused ones in front
        self._running: dict[str, RequestState] = {}  # in the order of their start
        self._in_flight: dict[str, RequestState] = {}  # those of the step being executed
        self._finished_ids: list[str] = []  # the runner still has to forget these
        self._next_step_id = 0

    # --- requests come and go -------------------------------------------------------------------

    def add_request(self, request: Request, now_s: float) -> None:
        """Queue a request.

        Args:
            request: Its id must not be in use.
            now_s: The time on the clock that ``schedule`` is given too, in seconds.

        Raises:
            InvalidRequestError: The request is malformed, or its id is in use.
            ContextLengthError: It can never fit the context, the KV cache or a step.
            EngineOverloadedError: ``max_queue_size`` requests are waiting.
        """
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request_id {request.request_id!r} is in use already")
        max_total_tokens = check_request(
            request,
            max_seq_len=self.max_seq_len,
            max_kv_tokens=self._kv.max_tokens,
            max_prompt_tokens=None if self.enable_chunked_prefill else self.max_num_tokens,
        )
        if len(self._waiting) >= self.max_queue_size:
            raise EngineOverloadedError(
                f"{len(self._waiting)} requests are waiting, the most that may; try again later"
            )
        token_ids = list(request.prompt_token_ids)
        sequence = self._kv.new_sequence(token_ids, request.cache_salt)
        state = RequestState(request, max_total_tokens, now_s, token_ids, sequence)
        self._requests[request.request_id] = state
        self._waiting.append(state)

    def abort_request(self, request_id: str) -> Output | None:
        """End a request, in mid-step too; return its last output, or None if there is none such."""
        state = self._requests.get(request_id)
        if state is None:
            return None
        state.finish_reason = FinishReason.ABORT
        self._remove(state)
        return state.output()

    def has_unfinished_requests(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self._requests)

    def has_finished_requests(self) -> bool:
        """Whether the runner still has to be told of ended requests.

        It holds nothing up: the next step carries them. A loop that is going to sleep may schedule
        once more, to send a step that computes nothing.
        """
        return bool(self._finished_ids)

    # --- one step -------------------------------------------------------------------------------

    def schedule(self, now_s: float) -> SchedulerOutput:
        """Put the next step together.

        Returns:
            The step, without anything to compute if there is no request. It has to be executed,
            for blocks are already given out, and handed to ``update_from_output``.

        Raises:
            RuntimeError: The last step has not come back to ``update_from_output`` yet.
        """
        if self._in_flight:
            raise RuntimeError("schedule() before update_from_output() of the step under way")
        step = _Step(SchedulerOutput(step_id=self._next_step_id), self.max_num_tokens)
        self._next_step_id += 1
        self._schedule_running(step)
        if not step.round_ended:
            self._start_waiting(step, now_s)
        step.output.finished_request_ids, self._finished_ids = self._finished_ids, []
        step.output.scheduled = step.decodes + step.prefills
        self._in_flight = step.requests
        return step.output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, runner_output: ModelRunnerOutput
    ) -> list[Output]:
        """Take in what a step brought: append tokens, end requests, free blocks.

        Returns:
            One output for each request that got tokens or ended, in the order of the step.

        Raises:
            EngineError: The runner did not answer as the step asked.
        """
        in_flight, self._in_flight = self._in_flight, {}
        if in_flight.keys() != {scheduled.request_id for scheduled in scheduler_output.scheduled}:
            raise EngineError(f"step {scheduler_output.step_id} is not the step under way")
        outputs = []
        for scheduled in scheduler_output.scheduled:
            state = in_flight[scheduled.request_id]
            if state.finish_reason is not None:  # aborted meanwhile
                self._kv.free(state.sequence)
                continue
            output = self._update_request(state, scheduled, runner_output)
            if output is not None:
                outputs.append(output)
        self.stats.num_steps += bool(in_flight)
        return outputs

    # --- inside ---------------------------------------------------------------------------------

    def _schedule_running(self, step: _Step) -> None:
        # First who gets how many tokens, then blocks in the order of the start, so that whoever is
        # paused lies at or behind the one that finds no block and has not been scheduled yet.
        shares = self._share_budget(step)
        for state in list(self._running.values()):
            num_tokens = shares.get(state.request_id, 0)
            if num_tokens == 0:
                continue
            total = state.num_computed_tokens + num_tokens
            while state.request_id in self._running:
                new_block_ids = self._kv.grow(state.sequence, total)
                if new_block_ids is not None:
                    self._add(step, state, num_tokens, new_block_ids)
                    break
                self._pause_last_started()
                step.round_ended = True  # blocks are short: nobody starts in this step

    def _share_budget(self, step: _Step) -> dict[str, int]:
        shares: dict[str, int] = {}
        decodes = [state for state in self._running.values() if not state.is_prefill]
        prefills = [state for state in self._running.values() if state.is_prefill]
        for state in decodes + prefills:
            num_tokens = self._share(state, state.num_remaining_tokens, step.token_budget)
            if num_tokens == 0:
                step.round_ended = True
                break
            shares[state.request_id] = num_tokens
            step.token_budget -= num_tokens
        return shares

    def _share(self, state: RequestState, num_remaining_tokens: int, token_budget: int) -> int:
        # The tokens a request gets of what is left of the budget, 0 for none.
        if num_remaining_tokens <= token_budget:
            return num_remaining_tokens
        if self.enable_chunked_prefill or state.num_preemptions > 0:
            return token_budget // self._chunk_unit_tokens * self._chunk_unit_tokens
        return 0

    def _start_waiting(self, step: _Step, now_s: float) -> None:
        # Looking at no more than a batch bounds the work of a step where many are put off.
        for state in list(islice(self._waiting, self.max_batch_size)):
            if len(self._running) == self.max_batch_size:
                return
            prefix = self._kv.find_prefix(state.sequence)
            if prefix.missing_key in step.computed_keys:
                continue  # put off: after this step the block can be reused
            remaining = len(state.token_ids) - prefix.num_tokens
            num_tokens = self._share(state, remaining, step.token_budget)
            if num_tokens == 0:
                return
            reserve = self.policy == "guaranteed_no_evict"
            block_ids = self._kv.start(
                state.sequence,
                prefix,
                num_tokens=prefix.num_tokens + num_tokens,
                reserve_tokens=state.max_kv_tokens if reserve else len(state.token_ids),
            )
            if block_ids is None:
                return
            self._waiting.remove(state)
            self._running[state.request_id] = state
            if state.start(prefix.num_tokens, now_s):
                self._count_start(state)
            step.token_budget -= num_tokens
            step.output.new_requests.append(state.as_new())
            self._add(step, state, num_tokens, block_ids)

    def _count_start(self, state: RequestState) -> None:
        size, groups = self._kv.tokens_per_block, len(self._kv.groups)
        num_missed_tokens = state.num_prompt_tokens - state.num_cached_tokens
        self.stats.prompt_tokens += state.num_prompt_tokens
        self.stats.reused_blocks += state.num_cached_tokens // size * groups
        self.stats.missed_blocks += num_missed_tokens // size * groups
        self.stats.prefix_cache_hits_tokens += state.num_cached_tokens
        if self._kv.enable_block_reuse:
            self.stats.prefix_cache_queries_tokens += state.num_prompt_tokens

    def _add(
        self, step: _Step, state: RequestState, num_tokens: int, new_block_ids: BlockIds
    ) -> None:
        start = state.num_computed_tokens
        scheduled = ScheduledRequest(
            request_id=state.request_id,
            num_computed_tokens=start,
            num_tokens=num_tokens,
            new_block_ids=new_block_ids,
        )
        step.requests[state.request_id] = state
        if state.is_prefill:
            step.prefills.append(scheduled)
            step.computed_keys.update(
                self._kv.keys_within(state.sequence, start, start + num_tokens)
            )
        else:
            step.decodes.append(scheduled)

    def _pause_last_started(self) -> None:
        request_id, state = self._running.popitem()
        self._kv.free(state.sequence)
        state.pause()
        self.stats.num_preemptions += 1
        self._finished_ids.append(request_id)
        self._waiting.appendleft(state)

    def _update_request(
        self, state: RequestState, scheduled: ScheduledRequest, runner_output: ModelRunnerOutput
    ) -> Output | None:
        request_id = state.request_id
        error = runner_output.errors.get(request_id)
        if error is not None:
            state.finish_reason = FinishReason.ERROR
            self._remove(state)
            return state.output(error=error)
        sampled = runner_output.token_ids.get(request_id, [])
        accepted = state.advance(scheduled.num_tokens, sampled)
        self._kv.commit(state.sequence, state.num_computed_tokens)
        self.stats.generation_tokens += len(accepted)
        if state.finish_reason is not None:
            self._remove(state)
        if not accepted:
            return None
        logprobs = runner_output.logprobs.get(request_id)
        return state.output(accepted, None if logprobs is None else logprobs[: len(accepted)])

    def _remove(self, state: RequestState) -> None:
        # The one place where a request leaves, whatever the reason.
        assert state.finish_reason is not None
        reason = state.finish_reason.value
        self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1
        del self._requests[state.request_id]
        if self._running.pop(state.request_id, None) is None:
            self._waiting.remove(state)
            return
        self._finished_ids.append(state.request_id)
        if self._in_flight.get(state.request_id) is not state:
            self._kv.free(state.sequence)  # else update_from_output does it, after the step

    # --- looking in -----------------------------------------------------------------------------

    def snapshot(self) -> EngineStats:
        """Refresh the gauges of ``stats`` and return a copy."""
        usage = self._kv.usage()
        self.stats.num_running_requests = len(self._running)
        self.stats.num_queued_requests = len(self._waiting)
        self.stats.max_num_blocks = usage.total
        self.stats.free_num_blocks = usage.free
        self.stats.used_num_blocks = usage.total - usage.free
        self.stats.cached_num_blocks = usage.idle
        return replace(self.stats, finished=dict(self.stats.finished))

    def check_integrity(self) -> None:
        """Check that every request is in one place and every block accounted for.

        Raises:
            AssertionError: The books are wrong.
        """
        self._kv.check_integrity()
        waiting = [state.request_id for state in self._waiting]
        places = waiting + list(self._running)
        assert sorted(places) == sorted(self._requests), "a request is lost or doubled"
        assert len(self._running) <= self.max_batch_size, "the batch is too large"
        for state in self._requests.values():
            assert state.finish_reason is None, f"{state.request_id} has ended and is still here"
            assert 0 <= state.num_computed_tokens < len(state.token_ids)
        if not self._running and not self._in_flight:
            assert self._kv.usage().free == self._kv.usage().total, "blocks are held by nobody"
