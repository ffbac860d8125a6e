"""Counters and gauges of an engine: plain data, kept by the scheduler, read by /metrics.

All of TensorRT-LLM's iteration stats are here, under its names in our spelling: fields that begin
with ``iter_`` are of the last step that computed anything, the other gauges of the moment.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """A snapshot. Counters only grow while the engine lives.

    Attributes:
        num_running_requests: In the batch now (numActiveRequests).
        num_queued_requests: Waiting, paused ones included.
        max_num_active_requests: Most that may be in the batch.
        num_steps: Counter of steps that computed something (iter).
        last_step_s: Wall time of the last step, in seconds (iterLatencyMS).
        iter_scheduled_requests: Requests that computed something in the last step.
        iter_context_requests: Of these, prefills.
        iter_gen_requests: Of these, decodes.
        iter_paused_requests: Paused by it.
        iter_context_tokens: Prompt tokens computed in it.
        iter_decoded_tokens: Tokens that its decodes brought (avgNumDecodedTokensPerIter is this
            over iter_gen_requests).
        iter_new_requests: Requests that ran for the first time in it.
        iter_queue_s: Seconds that these waited, all together (newActiveRequestsQueueLatencyMS).
        num_preemptions: Counter of pauses under max_utilization.
        num_completed_requests: Counter of requests that ended, for whatever reason.
        finished: The same by finish reason.
        max_num_blocks: Size of the KV pool, over all groups.
        free_num_blocks: Free, cached (reusable) ones included.
        used_num_blocks: Held by requests.
        cached_num_blocks: Held by none but kept for reuse.
        tokens_per_block: Tokens of one block.
        alloc_total_blocks: Counter of blocks given to requests, reused ones included.
        alloc_new_blocks: Counter of those that were not reused.
        reused_blocks: Counter of blocks found in the reuse tree.
        missed_blocks: Counter of full prompt blocks that had to be computed.
        prefix_cache_queries_tokens: Counter of prompt tokens looked up.
        prefix_cache_hits_tokens: Counter of those found.
        prompt_tokens: Counter of prompt tokens of admitted requests.
        generation_tokens: Counter of generated tokens.
        num_drafts: Counter of requests' steps that verified guesses.
        num_draft_tokens: Counter of guesses that were verified.
        num_accepted_draft_tokens: Counter of those that were right.
    """

    num_running_requests: int = 0
    num_queued_requests: int = 0
    max_num_active_requests: int = 0
    num_steps: int = 0
    last_step_s: float = 0.0
    iter_scheduled_requests: int = 0
    iter_context_requests: int = 0
    iter_gen_requests: int = 0
    iter_paused_requests: int = 0
    iter_context_tokens: int = 0
    iter_decoded_tokens: int = 0
    iter_new_requests: int = 0
    iter_queue_s: float = 0.0
    num_preemptions: int = 0
    num_completed_requests: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    max_num_blocks: int = 0
    free_num_blocks: int = 0
    used_num_blocks: int = 0
    cached_num_blocks: int = 0
    tokens_per_block: int = 0
    alloc_total_blocks: int = 0
    alloc_new_blocks: int = 0
    reused_blocks: int = 0
    missed_blocks: int = 0
    prefix_cache_queries_tokens: int = 0
    prefix_cache_hits_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0

    @property
    def cache_hit_rate(self) -> float:
        """Share of the full prompt blocks that were reused; 0 before any was looked up."""
        total = self.reused_blocks + self.missed_blocks
        return self.reused_blocks / total if total else 0.0
