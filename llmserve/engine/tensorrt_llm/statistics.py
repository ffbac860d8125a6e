"""TensorRT-LLM's statistics of its iterations, and our own count of requests, as EngineStats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmserve.core.request import FinishReason, Request
from llmserve.core.stats import EngineStats


class StatisticsBook:
    """Counts what is submitted and ended, and keeps what the last iteration told.

    What TensorRT-LLM does not tell stays 0: blocks kept for reuse are among its free ones.
    """

    def __init__(self) -> None:
        self._stats = EngineStats()
        self._num_scheduled = 0
        self.tokens_per_block = 0
        """Of its KV cache; 0 until the first iteration has told."""

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
        stats.finished[reason.value] = stats.finished.get(reason.value, 0) + 1

    def iteration(self, iteration: Mapping[str, Any]) -> None:
        """Take one iteration's statistics, under TensorRT-LLM's names."""
        stats = self._stats
        batch = iteration.get("inflightBatchingStats") or {}
        cache = iteration.get("kvCacheStats") or {}
        stats.num_steps += 1
        stats.last_step_s = float(iteration.get("iterLatencyMS", 0.0)) / 1000
        stats.num_preemptions += int(batch.get("numPausedRequests", 0))
        self._num_scheduled = int(batch.get("numScheduledRequests", 0))
        stats.max_num_blocks = int(cache.get("maxNumBlocks", stats.max_num_blocks))
        stats.free_num_blocks = int(cache.get("freeNumBlocks", stats.free_num_blocks))
        stats.used_num_blocks = int(cache.get("usedNumBlocks", stats.used_num_blocks))
        # Counted since its start, as ours are.
        stats.reused_blocks = int(cache.get("reusedBlocks", stats.reused_blocks))
        stats.missed_blocks = int(cache.get("missedBlocks", stats.missed_blocks))
        self.tokens_per_block = int(cache.get("tokensPerBlock", self.tokens_per_block))

    def snapshot(self, num_open_requests: int) -> EngineStats:
        """The numbers now, with so many requests open.

        The last iteration's numbers outlive it, so that what is open now has the last word.
        """
        stats = self._stats
        stats.num_running_requests = min(self._num_scheduled, num_open_requests)
        stats.num_queued_requests = num_open_requests - stats.num_running_requests
        if not num_open_requests:
            stats.used_num_blocks, stats.free_num_blocks = 0, stats.max_num_blocks
        return replace(stats, finished=dict(stats.finished))
