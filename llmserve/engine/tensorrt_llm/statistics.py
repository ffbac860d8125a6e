"""TensorRT-LLM's statistics of its iterations, and our own count of requests, as EngineStats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmserve.core.request import FinishReason, Request
from llmserve.core.stats import EngineStats

# Its counts are those since its start, as ours are.
_CACHE_STATS = {
    "max_num_blocks": "maxNumBlocks",
    "free_num_blocks": "freeNumBlocks",
    "used_num_blocks": "usedNumBlocks",
    "tokens_per_block": "tokensPerBlock",
    "alloc_total_blocks": "allocTotalBlocks",
    "alloc_new_blocks": "allocNewBlocks",
    "reused_blocks": "reusedBlocks",
    "missed_blocks": "missedBlocks",
}


class StatisticsBook:
    """Counts what is submitted and ended, and keeps what the last iteration told.

    What TensorRT-LLM does not tell stays 0: blocks kept for reuse are among its free ones.
    """

    def __init__(self) -> None:
        self._stats = EngineStats()

    @property
    def tokens_per_block(self) -> int:
        """Of its KV cache; 0 until the first iteration has told."""
        return self._stats.tokens_per_block

    @property
    def max_num_blocks(self) -> int:
        """Blocks of the KV cache; 0 until the first iteration has told."""
        return self._stats.max_num_blocks

    def submitted(self, request: Request) -> None:
        """A request was taken."""
        self._stats.prompt_tokens += len(request.prompt_token_ids)

    def generated(self, num_tokens: int) -> None:
        """So many tokens have come."""
        self._stats.generation_tokens += num_tokens

    def ended(self, request: Request, reason: FinishReason, num_cached_tokens: int) -> None:
        """A request is over."""
        stats = self._stats
        stats.prefix_cache_queries_tokens += len(request.prompt_token_ids)
        stats.prefix_cache_hits_tokens += num_cached_tokens
        stats.num_completed_requests += 1
        stats.finished[reason.value] = stats.finished.get(reason.value, 0) + 1

    def iteration(self, iteration: Mapping[str, Any]) -> None:
        """Take one iteration's statistics, under TensorRT-LLM's names."""
        stats = self._stats
        batch = iteration.get("inflightBatchingStats") or {}
        cache = iteration.get("kvCacheStats") or {}
        stats.num_steps += 1
        stats.last_step_s = float(iteration.get("iterLatencyMS", 0.0)) / 1000
        stats.max_num_active_requests = int(iteration.get("maxNumActiveRequests", 0))
        stats.iter_new_requests = int(iteration.get("numNewActiveRequests", 0))
        stats.iter_queue_s = float(iteration.get("newActiveRequestsQueueLatencyMS", 0.0)) / 1000
        stats.iter_scheduled_requests = int(batch.get("numScheduledRequests", 0))
        stats.iter_context_requests = int(batch.get("numContextRequests", 0))
        stats.iter_gen_requests = int(batch.get("numGenRequests", 0))
        stats.iter_paused_requests = int(batch.get("numPausedRequests", 0))
        stats.num_preemptions += stats.iter_paused_requests
        stats.iter_context_tokens = int(batch.get("numCtxTokens", 0))
        per_decode = float(batch.get("avgNumDecodedTokensPerIter", 0.0))
        stats.iter_decoded_tokens = round(per_decode * stats.iter_gen_requests)
        for field, name in _CACHE_STATS.items():
            setattr(stats, field, int(cache.get(name, getattr(stats, field))))

    def snapshot(self, num_open_requests: int) -> EngineStats:
        """The numbers now, with so many requests open.

        The last iteration's numbers outlive it, so that what is open now has the last word.
        """
        stats = self._stats
        stats.num_running_requests = min(stats.iter_scheduled_requests, num_open_requests)
        stats.num_queued_requests = num_open_requests - stats.num_running_requests
        if not num_open_requests:
            stats.used_num_blocks, stats.free_num_blocks = 0, stats.max_num_blocks
        return replace(stats, finished=dict(stats.finished))
