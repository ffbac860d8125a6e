"""Decides which requests run in each step and how many tokens each: in-flight batching.

It handles token counts and block ids, never tensors, and knows neither the model nor who listens to
the outputs. A step is three calls, and the next one may be scheduled before the last one is back
(it then counts on one token for each request that samples)::

    scheduler_output = scheduler.schedule(now_s)
    runner_output = runner.finish(runner.launch(scheduler_output))
    outputs = scheduler.update_from_output(scheduler_output, runner_output)

Each step goes by TensorRT-LLM's rules. **Token budget** of max_num_tokens: decodes come first;
prefills get what is left, first come first served, rounded down to whole chunk units where it does
not suffice. The first that gets nothing ends the round: nobody behind it starts, so what holds it
up drains. **Capacity**: under guaranteed_no_evict a request starts only if all blocks it may ever
need fit beside what the running ones may still need; no running request is ever paused. Under
max_utilization it starts if the tokens it has now fit; when a running one later finds no block, the
last started at or behind it is paused and it tries again. So the first started can always go on,
and with it everything comes to its turn; and who waits comes before running ones of lower priority,
which are paused for it. **Reuse**: a waiting request whose first missing block is
computed by another one in a step under way is put off, alone, to find that block later instead of
computing it twice. **Guesses** to verify take what nobody else wants of budget and blocks.
"""

from __future__ import annotations

from llmserve.config import CapacitySchedulerPolicy
from llmserve.core.kv_cache_manager import KVCacheManager
from llmserve.core.request_state import RequestState
from llmserve.core.request_table import RequestTable, StepUnderWay
from llmserve.core.speculation import Speculator
from llmserve.core.step import BlockIds, ScheduledPrefill, SchedulerOutput

_MAX_STEPS_UNDER_WAY = 2


class Scheduler(RequestTable):
    """Prioritised, first come first served, in-flight batching over a paged KV cache.

    Args:
        max_batch_size: Most requests in the running batch.
        max_num_tokens: Most tokens computed in one step, at least max_batch_size.
        max_seq_len: Longest prompt plus answer, in tokens.
        kv: The KV cache; nobody else may allocate from it.
        policy: guaranteed_no_evict or max_utilization.
        enable_chunked_prefill: Let a prefill be computed over several steps. Without it a prompt
            longer than max_num_tokens is refused; only what is recomputed after a pause, and has
            outgrown max_num_tokens, is still computed in chunks.
        max_queue_size: Most requests that may wait.
        chunk_unit_tokens: Chunks are multiples of it; None takes the block size.
        speculator: Guesses tokens; None: nobody does.
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
        chunk_unit_tokens: int | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        if max_num_tokens < max_batch_size:
            raise ValueError(f"max_num_tokens {max_num_tokens} < max_batch_size {max_batch_size}")
        super().__init__(
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            max_prompt_tokens=None if enable_chunked_prefill else max_num_tokens,
            max_queue_size=max_queue_size,
            kv=kv,
            speculator=speculator,
        )
        self.max_num_tokens = max_num_tokens
        self.policy = policy
        self.enable_chunked_prefill = enable_chunked_prefill
        # A budget below one unit would round every chunk down to nothing.
        self._chunk_unit_tokens = min(chunk_unit_tokens or kv.tokens_per_block, max_num_tokens)
        self._next_step_id = 0

    @property
    def may_run_ahead(self) -> bool:
        """Whether ``schedule`` may be called before the step under way has come back: not while
        there are guesses to verify, which have to follow what it brings, nor while it verifies
        some, for how far it gets is not known.
        """
        if any(step.output.draft_token_ids for step in self._under_way):
            return False
        return self._speculator is None or not self._speculator.guesses

    def schedule(self, now_s: float) -> SchedulerOutput:
        """Put the next step together.

        Returns:
            The step, without anything to compute if no request can use it. It has to be executed,
            for blocks are already given out, and handed to ``update_from_output``.

        Raises:
            RuntimeError: Two steps have not come back to ``update_from_output`` yet.
        """
        if len(self._under_way) == _MAX_STEPS_UNDER_WAY:
            raise RuntimeError(f"{_MAX_STEPS_UNDER_WAY} steps are under way already")
        output = SchedulerOutput(step_id=self._next_step_id)
        output.block_copies = tuple([] for _ in self._kv.groups)
        num_decodes = len(self._running) - len(self._prefilling)
        step = StepUnderWay(output, self.max_num_tokens - num_decodes)
        self._next_step_id += 1
        outranked = self._outranked()
        self._continue_running(step, self._running[: len(self._running) - len(outranked)])
        if outranked and not step.round_ended:
            self._start_waiting(step, now_s, outranked)
        self._continue_running(step, outranked)
        if not step.round_ended:
            self._start_waiting(step, now_s, [])
        if self._speculator is not None and not self._under_way:
            self._add_drafts(step, self._speculator)
        output.decodes = [state.request_id for state in step.decodes]
        output.finished_request_ids, self._finished_ids = self._finished_ids, []
        self._under_way.append(step)
        return output

    def _outranked(self) -> list[RequestState]:
        """Running requests that give way to one that waits, under max_utilization."""
        if self.policy != "max_utilization" or not self._waiting or not self._running:
            return []
        first = next(iter(self._waiting)).rank
        if self._running[-1].rank <= first:
            return []
        return [state for state in self._running if state.rank > first]

    def _continue_running(self, step: StepUnderWay, states: list[RequestState]) -> None:
        for state in states:
            position = state.num_computed_tokens
            if position < state.checkpoint:  # a decode, and there is room in its blocks
                state.num_computed_tokens = position + 1
                step.decodes.append(state)
            elif not state.running:
                return  # paused in this very round, like all behind it
            elif state.is_prefill:
                rest = state.num_prefill_tokens - position
                self._continue(step, state, self._share(step, state, rest))
            elif position < state.max_kv_tokens:  # else its last token is being sampled
                self._continue(step, state, 1)

    def _continue(self, step: StepUnderWay, state: RequestState, num_tokens: int) -> None:
        start = state.num_computed_tokens
        while num_tokens and state.running:
            new_block_ids = self._kv.grow(state.sequence, start, start + num_tokens)
            if new_block_ids is not None:
                self._add(step, state, num_tokens, new_block_ids)
                return
            self._pause(self._running[-1], step)
            step.round_ended = True  # blocks are short: nobody starts in this step

    def _share(self, step: StepUnderWay, state: RequestState, num_tokens: int) -> int:
        """What a prefill of so many tokens gets of the budget; 0 ends the round."""
        if num_tokens > step.token_budget:
            chunked = self.enable_chunked_prefill or state.num_preemptions > 0
            units = step.token_budget // self._chunk_unit_tokens if chunked else 0
            num_tokens = units * self._chunk_unit_tokens
        if num_tokens == 0:
            step.token_budget, step.round_ended = 0, True
        return num_tokens

    def _start_waiting(
        self, step: StepUnderWay, now_s: float, outranked: list[RequestState]
    ) -> None:
        num_outranked, worst = len(outranked), outranked[0].rank if outranked else None
        # Looking at no more than a batch bounds the work of a step where many are put off.
        for state in self._waiting.next_ones(self.max_batch_size):
            if worst is not None and state.rank >= worst:
                continue  # behind those, which have not been scheduled yet
            while not (starts := self._start(step, state, now_s)):
                if step.round_ended or not (outranked and outranked[-1].rank > state.rank):
                    break
                self._pause(outranked.pop(), step)
            if not starts:
                break
        if len(outranked) < num_outranked:
            step.round_ended = True  # nobody starts before those that were paused

    def _start(self, step: StepUnderWay, state: RequestState, now_s: float) -> bool:
        """Start a request, or put it off; return False if there is no room for it."""
        if state.paused_at > self._last_taken_in:
            return True  # put off: the step that it was paused in still brings it a token
        if len(self._running) == self.max_batch_size:
            return False
        prefix = self._kv.find_prefix(state.sequence, reuse=state.prompt_logprobs is None)
        if any(prefix.missing_key in other.computed_keys for other in (*self._under_way, step)):
            return True  # put off: after that step the block can be reused
        total = len(state.token_ids)
        num_tokens = self._share(step, state, total - prefix.num_tokens)
        if num_tokens == 0:
            return False
        reserve = self.policy == "guaranteed_no_evict"
        started = self._kv.start(
            state.sequence,
            prefix,
            num_tokens=prefix.num_tokens + num_tokens,
            reserve_tokens=state.max_kv_tokens if reserve else total,
        )
        if started is None:
            return False
        self._enter_batch(state)
        if state.start(prefix.num_tokens, now_s):
            self._count_start(step, state, prefix)
        self._prefilling[state.request_id] = state
        step.output.new_requests.append(state.as_new())
        for copies, more in zip(step.output.block_copies, started.block_copies, strict=True):
            copies += more
        self._add(step, state, num_tokens, started.block_ids)
        return True

    def _add(
        self, step: StepUnderWay, state: RequestState, num_tokens: int, new_block_ids: BlockIds
    ) -> None:
        """Give a request its tokens, for which it has blocks."""
        start = state.num_computed_tokens
        state.num_computed_tokens = start + num_tokens
        if any(new_block_ids):
            step.output.new_block_ids[state.request_id] = new_block_ids
        if start >= state.num_prefill_tokens:
            step.decodes.append(state)
        else:
            step.token_budget -= num_tokens
            step.prefills.append(state)
            step.output.prefills.append(
                ScheduledPrefill(
                    request_id=state.request_id, num_computed_tokens=start, num_tokens=num_tokens
                )
            )
            keys = self._kv.keys_within(state.sequence, start, start + num_tokens)
            step.computed_keys.update(keys)
        if not state.is_prefill:
            self._prefilling.pop(state.request_id, None)
            state.checkpoint = min(state.sequence.num_block_tokens, state.max_kv_tokens)

    def _add_drafts(self, step: StepUnderWay, speculator: Speculator) -> None:
        decodes = {state.request_id: state for state in step.decodes}
        for request_id, guess in speculator.guesses.items():
            state = decodes.get(request_id)
            if state is None:
                continue
            # Each guess may bring a token, and the newest one brings one besides.
            start = state.num_computed_tokens
            count = min(len(guess), step.token_budget, state.max_kv_tokens - start)
            # The step begins with the newest token, so its window has to stay.
            new_block_ids = self._kv.grow(state.sequence, start - 1, start + count)
            if count < 1 or new_block_ids is None:
                continue
            step.token_budget -= count
            state.num_computed_tokens = start + count
            state.checkpoint = min(state.sequence.num_block_tokens, state.max_kv_tokens)
            step.output.draft_token_ids[request_id] = guess[:count]
            if any(new_block_ids):
                before = step.output.new_block_ids.get(request_id, ([],) * len(new_block_ids))
                step.output.new_block_ids[request_id] = tuple(
                    [*ids, *more] for ids, more in zip(before, new_block_ids, strict=True)
                )
