"""Counters and gauges of an engine: plain data, kept by the scheduler, read by /metrics."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """A snapshot. Counters only grow while the engine lives; names after TensorRT-LLM's stats.

    Attributes:
        num_running_requests: In the batch now.
        num_queued_requests: Waiting, preempted ones included.
        num_preemptions: Counter of pauses under max_utilization.
        max_num_blocks: Size of the KV pool.
        free_num_blocks: Free, cached (reusable) ones included.
        used_num_blocks: Held by requests.
        cached_num_blocks: Held by none but kept for reuse.
        reused_blocks: Counter of blocks found in the reuse tree.
        missed_blocks: Counter of full prompt blocks that had to be computed.
        prefix_cache_queries_tokens: Counter of prompt tokens looked up.
        prefix_cache_hits_tokens: Counter of those found.
        prompt_tokens: Counter of prompt tokens of admitted requests.
        generation_tokens: Counter of generated tokens.
        num_steps: Counter of steps.
        last_step_s: Wall time of the last step, in seconds.
        finished: Counter by finish reason.
    """

    num_running_requests: int = 0
    num_queued_requests: int = 0
    num_preemptions: int = 0
    max_num_blocks: int = 0
    free_num_blocks: int = 0
    used_num_blocks: int = 0
    cached_num_blocks: int = 0
    reused_blocks: int = 0
    missed_blocks: int = 0
    prefix_cache_queries_tokens: int = 0
    prefix_cache_hits_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_steps: int = 0
    last_step_s: float = 0.0
    finished: dict[str, int] = field(default_factory=dict)
