"""The books of all unfinished requests: they come, get what steps bring, and go.

The life of a request, and where its blocks are::

    add_request --> waiting --start--> running --stop, length, error, timeout--> gone (blocks freed)
                       ^                 |
                       +----- pause -----+      (blocks freed, tokens kept, recomputed later)

    abort_request and expire end it anywhere.

Blocks are freed at once, even while a step is under way that writes them: steps are executed in
their order, so whoever is given the block writes it later. What that step brings for a request that
has ended is dropped; to one that was paused it brings its next token all the same.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from dataclasses import dataclass, field, replace

from llmserve.core.admission import check_request
from llmserve.core.constraint import TokenConstraint
from llmserve.core.kv_cache_manager import KVCacheManager, PrefixMatch
from llmserve.core.request import FinishReason, Output, Request
from llmserve.core.request_queue import RequestQueue
from llmserve.core.request_state import RequestState
from llmserve.core.speculation import Speculator
from llmserve.core.stats import EngineStats
from llmserve.core.step import ModelRunnerOutput, SchedulerOutput
from llmserve.errors import EngineError, EngineOverloadedError, InvalidRequestError


@dataclass(slots=True)
class StepUnderWay:
    """A step from its scheduling until its result has been taken in.

    Attributes:
        output: What the runner was told.
        token_budget: Tokens it may still take in, while it is being put together.
        decodes: Behind ``output.decodes``.
        prefills: Behind ``output.prefills``.
        computed_keys: Of the blocks that its prefills complete.
        round_ended: Somebody got nothing: nobody may start behind them.
        num_new: Requests that ran for the first time.
        queue_s: Seconds that these had waited, all together.
        num_paused: Requests that were paused for it.
    """

    output: SchedulerOutput
    token_budget: int
    decodes: list[RequestState] = field(default_factory=list)
    prefills: list[RequestState] = field(default_factory=list)
    computed_keys: set[bytes] = field(default_factory=set)
    round_ended: bool = False
    num_new: int = 0
    queue_s: float = 0.0
    num_paused: int = 0


class RequestTable:
    """All unfinished requests, waiting or running. ``Scheduler`` adds the rules of who runs.

    Args:
        max_batch_size: Most requests in the running batch.
        max_seq_len: Longest prompt plus answer, in tokens.
        max_prompt_tokens: Longest prompt, or None for no such limit.
        max_queue_size: Most requests that may wait.
        kv: The KV cache; nobody else may allocate from it.
        speculator: Guesses tokens; None: nobody does.

    Attributes:
        stats: Counters; ``snapshot`` has the gauges as well.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_seq_len: int,
        max_prompt_tokens: int | None,
        max_queue_size: int,
        kv: KVCacheManager,
        speculator: Speculator | None,
    ) -> None:
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        self.max_queue_size = max_queue_size
        self.stats = EngineStats(
            max_num_active_requests=max_batch_size, tokens_per_block=kv.tokens_per_block
        )
        self._max_prompt_tokens = max_prompt_tokens
        self._kv = kv
        self._speculator = speculator
        self._requests: dict[str, RequestState] = {}  # all unfinished ones
        self._bound_ids: set[str] = set()  # those of them with a constraint
        self._waiting = RequestQueue()
        self._running: list[RequestState] = []  # by rank, then in the order of their start
        self._prefilling: dict[str, RequestState] = {}  # those of them with more prompt to schedule
        self._under_way: deque[StepUnderWay] = deque()  # the oldest first
        self._last_taken_in = -1  # the id of the last step whose result is known
        self._finished_ids: list[str] = []  # the runner still has to forget these
        self._deadlines: list[tuple[float, int, RequestState]] = []  # a heap
        self._num_added = self._num_started = 0

    # --- requests come and go -------------------------------------------------------------------

    def add_request(
        self, request: Request, now_s: float, constraint: TokenConstraint | None = None
    ) -> None:
        """Queue a request.

        Args:
            request: Its id must not be in use.
            now_s: The time on the clock that ``schedule`` and ``expire`` are given too, in seconds.
            constraint: What its answer has to match, for a request with ``guided_decoding``.

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
            max_prompt_tokens=self._max_prompt_tokens,
        )
        if len(self._waiting) >= self.max_queue_size:
            raise EngineOverloadedError(
                f"{len(self._waiting)} requests are waiting, the most that may; try again later"
            )
        tokens = list(request.prompt_token_ids)
        sequence = self._kv.new_sequence(tokens, request.cache_salt, request.retention_priority)
        state = RequestState(request, max_total_tokens, now_s, tokens, sequence, constraint)
        self._requests[request.request_id] = state
        if constraint is not None:
            self._bound_ids.add(request.request_id)
        self._waiting.push(state)
        self._num_added += 1
        if request.timeout_s is not None:
            self._add_deadline(state, now_s + request.timeout_s)

    def abort_request(self, request_id: str) -> Output | None:
        """End a request, in mid-step too; return its last output, or None if there is none such."""
        state = self._requests.get(request_id)
        return None if state is None else self._finish(state, FinishReason.ABORT)

    def expire(self, now_s: float) -> list[Output]:
        """End the requests whose timeout has passed; return their last outputs."""
        outputs = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            state = heapq.heappop(self._deadlines)[2]
            if state.finish_reason is None:
                timeout_s = round(state.request.timeout_s or 0.0, 3)
                error = f"the request did not end within its timeout of {timeout_s:g} s"
                outputs.append(self._finish(state, FinishReason.TIMEOUT, error))
        return outputs

    def has_unfinished_requests(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self._requests)

    def has_finished_requests(self) -> bool:
        """Whether the runner still has to be told of ended requests.

        It holds nothing up: the next step carries them. A loop that is going to sleep may schedule
        once more, to send a step that computes nothing.
        """
        return bool(self._finished_ids)

    # --- a step comes back ----------------------------------------------------------------------

    def constraints(self, scheduler_output: SchedulerOutput) -> dict[str, TokenConstraint]:
        """What the requests are bound by that sample in a step under way, by request id.

        To be asked when the results of all steps before it have been taken in.
        """
        if not self._bound_ids:
            return {}  # nearly always, and the step may be large
        step = next(step for step in self._under_way if step.output is scheduler_output)
        sampling = list(step.decodes)
        for state, prefill in zip(step.prefills, scheduler_output.prefills, strict=True):
            if prefill.num_computed_tokens + prefill.num_tokens == state.num_prefill_tokens:
                sampling.append(state)
        return {
            state.request_id: state.constraint
            for state in sampling
            if state.constraint is not None and state.finish_reason is None
        }

    def update_from_output(
        self, scheduler_output: SchedulerOutput, runner_output: ModelRunnerOutput
    ) -> list[Output]:
        """Take in what the oldest step under way brought: append tokens, end requests, free blocks.

        Returns:
            One output for each request that got tokens or ended, in the order of the step.

        Raises:
            EngineError: The runner did not answer as the step asked.
        """
        if not self._under_way or self._under_way[0].output is not scheduler_output:
            raise EngineError(f"step {scheduler_output.step_id} is not the oldest one under way")
        step = self._under_way.popleft()
        self._last_taken_in = scheduler_output.step_id
        outputs: list[Output] = []
        sampled = runner_output.token_ids
        for state in step.decodes:
            if state.finish_reason is not None:
                continue
            request_id, tokens = state.request_id, state.token_ids
            token_ids = sampled.get(request_id, ())
            if (
                len(tokens) + 1 < state.boundary
                and len(token_ids) == 1
                and token_ids[0] not in state.end_token_ids
            ):
                # Nearly all of them, nearly always: one token more, and nothing else to do.
                tokens.append(token_ids[0])
                cached, queue_s = state.num_cached_tokens, state.queue_s or 0.0
                outputs.append(
                    Output(request_id, token_ids, None, None, None, None, cached, queue_s)
                )
            else:
                self._take_in(step, state, runner_output, outputs, len(tokens))
        num_decodes = len(outputs)
        for state, prefill in zip(step.prefills, scheduler_output.prefills, strict=True):
            if state.finish_reason is None:
                stop = prefill.num_computed_tokens + prefill.num_tokens
                self._take_in(step, state, runner_output, outputs, stop)
        if scheduler_output.num_requests:
            num_tokens = [len(output.token_ids) for output in outputs]
            self._count_step(step, sum(num_tokens[:num_decodes]), sum(num_tokens))
        return outputs

    def _take_in(
        self,
        step: StepUnderWay,
        state: RequestState,
        runner_output: ModelRunnerOutput,
        outputs: list[Output],
        stop: int,
    ) -> None:
        """What a step brought for one request that has not ended, computed up to token ``stop``."""
        request_id = state.request_id
        error = runner_output.errors.get(request_id)
        if error is not None:
            outputs.append(self._finish(state, FinishReason.ERROR, error))
            return
        if state.prompt_logprobs is not None:
            state.prompt_logprobs += runner_output.prompt_logprobs.get(request_id, ())
        sampled = runner_output.token_ids.get(request_id, [])
        drafts = step.output.draft_token_ids.get(request_id, ())
        samples = stop == len(state.token_ids)
        if not samples <= len(sampled) <= samples * (1 + len(drafts)):
            raise EngineError(
                f"the model runner sampled {len(sampled)} tokens for {request_id} with {stop} of "
                f"{len(state.token_ids)} tokens and {len(drafts)} guesses computed"
            )
        try:
            accepted = state.accept(sampled)
        except InvalidRequestError as fault:
            outputs.append(self._finish(state, FinishReason.ERROR, str(fault)))
            return
        if drafts:
            self._count_drafts(len(drafts), len(accepted) - 1)
        if state.running:
            if drafts:  # those that were wrong are forgotten here, and written over
                state.num_computed_tokens -= len(drafts) + 1 - len(accepted)
            self._kv.commit(state.sequence, len(state.token_ids) - 1 if accepted else stop)
            self._set_boundary(state)
        if accepted:
            logprobs = runner_output.logprobs.get(request_id)
            outputs.append(state.output(accepted, logprobs and logprobs[: len(accepted)]))
        if state.finish_reason is not None:
            self._remove(state)
        elif (
            accepted and state.running and state.constraint is None and self._speculator is not None
        ):
            self._speculator.extended(request_id, state.token_ids)

    def _set_boundary(self, state: RequestState) -> None:
        wants_logprobs = state.request.sampling_params.logprobs is not None
        if wants_logprobs or state.prompt_logprobs is not None:
            return  # there is always more to do
        if state.constraint is not None or self._speculator is not None:
            return
        size, num_computed_tokens = self._kv.tokens_per_block, len(state.token_ids) - 1
        full = (num_computed_tokens // size + 1) * size + 1
        state.boundary = min(full, state.max_total_tokens)

    def _add_deadline(self, state: RequestState, deadline_s: float) -> None:
        if len(self._deadlines) > 2 * len(self._requests):  # most have ended long before
            self._deadlines = [item for item in self._deadlines if item[2].finish_reason is None]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (deadline_s, self._num_added, state))

    # --- a request leaves -----------------------------------------------------------------------

    def _finish(
        self, state: RequestState, reason: FinishReason, error: str | None = None
    ) -> Output:
        state.finish_reason = reason
        self._remove(state)
        return state.output(error=error)

    def _remove(self, state: RequestState) -> None:
        # The one place where a request leaves, whatever the reason.
        assert state.finish_reason is not None
        reason = state.finish_reason.value
        self.stats.num_completed_requests += 1
        self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1
        del self._requests[state.request_id]
        self._bound_ids.discard(state.request_id)
        if state.running:
            self._leave_batch(state)
        else:
            self._waiting.remove(state)

    def _pause(self, state: RequestState, step: StepUnderWay) -> None:
        self._leave_batch(state)
        state.pause(step.output.step_id - 1)
        step.num_paused += 1
        self.stats.num_preemptions += 1
        self._waiting.push_paused(state)

    def _enter_batch(self, state: RequestState) -> None:
        self._waiting.start(state)
        self._num_started += 1
        state.start_number = self._num_started
        insort(self._running, state, key=lambda other: (other.rank, other.start_number))

    def _leave_batch(self, state: RequestState) -> None:
        state.running = False
        self._running.remove(state)
        self._prefilling.pop(state.request_id, None)
        self._kv.free(state.sequence)
        self._finished_ids.append(state.request_id)
        if self._speculator is not None:
            self._speculator.forget(state.request_id)

    # --- counting and looking in ----------------------------------------------------------------

    def _count_start(self, step: StepUnderWay, state: RequestState, prefix: PrefixMatch) -> None:
        """It runs for the first time."""
        step.num_new += 1
        step.queue_s += state.queue_s or 0.0
        self.stats.prompt_tokens += state.num_prompt_tokens
        self.stats.reused_blocks += prefix.num_reused_blocks
        self.stats.missed_blocks += prefix.num_missed_blocks
        self.stats.prefix_cache_hits_tokens += prefix.num_tokens
        if self._kv.enable_block_reuse and state.prompt_logprobs is None:
            self.stats.prefix_cache_queries_tokens += state.num_prompt_tokens

    def _count_drafts(self, num_draft_tokens: int, num_right: int) -> None:
        self.stats.num_drafts += 1
        self.stats.num_draft_tokens += num_draft_tokens
        self.stats.num_accepted_draft_tokens += num_right

    def _count_step(self, step: StepUnderWay, num_decoded_tokens: int, num_tokens: int) -> None:
        stats = self.stats
        stats.num_steps += 1
        stats.generation_tokens += num_tokens
        stats.iter_scheduled_requests = step.output.num_requests
        stats.iter_context_requests = len(step.prefills)
        stats.iter_gen_requests = len(step.decodes)
        stats.iter_paused_requests = step.num_paused
        stats.iter_context_tokens = sum(prefill.num_tokens for prefill in step.output.prefills)
        stats.iter_decoded_tokens = num_decoded_tokens
        stats.iter_new_requests = step.num_new
        stats.iter_queue_s = step.queue_s

    def snapshot(self) -> EngineStats:
        """Refresh the gauges of ``stats`` and return a copy."""
        usage = self._kv.usage()
        self.stats.num_running_requests = len(self._running)
        self.stats.num_queued_requests = len(self._waiting)
        self.stats.max_num_blocks = usage.total
        self.stats.free_num_blocks = usage.free
        self.stats.used_num_blocks = usage.total - usage.free
        self.stats.cached_num_blocks = usage.idle
        self.stats.alloc_new_blocks = usage.allocated
        self.stats.alloc_total_blocks = usage.allocated + usage.shared
        return replace(self.stats, finished=dict(self.stats.finished))

    def check_integrity(self) -> None:
        """Check that every request is in one place and every block accounted for.

        Raises:
            AssertionError: The books are wrong.
        """
        self._kv.check_integrity()
        places = [state.request_id for state in (*self._waiting, *self._running)]
        assert sorted(places) == sorted(self._requests), "a request is lost or doubled"
        assert len(self._running) <= self.max_batch_size, "the batch is too large"
        order = [(state.rank, state.start_number) for state in self._running]
        assert order == sorted(order), "the running requests are out of order"
        prefilling = {state.request_id for state in self._running if state.is_prefill}
        assert prefilling == set(self._prefilling), "a prefill is lost or doubled"
        for state in self._requests.values():
            assert state.finish_reason is None, f"{state.request_id} has ended and is still here"
            most = len(state.token_ids) + sum(
                1 + len(step.output.draft_token_ids.get(state.request_id, ()))
                for step in self._under_way
                if state in step.decodes or state in step.prefills
            )
            assert 0 <= state.num_computed_tokens < max(most, len(state.token_ids) + 1)
        if not self._running:
            assert self._kv.usage().free == self._kv.usage().total, "blocks are held by nobody"
