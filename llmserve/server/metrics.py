"""Prometheus metrics, under the names that dashboards of other servers use after their prefix.

Histograms and the counts of ended answers are taken here, as a ``RequestObserver``; gauges and
token counters are the engine's own, all of ``EngineStats``, read when they are scraped. Gauges that
begin with ``iteration_`` are of its last step, as TensorRT-LLM's iteration stats are. Counters of
the engine begin at zero again when its process is restarted, as Prometheus expects of counters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llmserve.core.stats import EngineStats
from llmserve.openai.observer import AnswerTimes

_PREFIX = "llmserve:"
_LABEL = "model_name"
_REASON = "finished_reason"

_REQUEST_BUCKETS_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0),
)
_TOKEN_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1),
    *(0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0),
)
_COUNT_BUCKETS = tuple(float(base * 10**power) for power in range(6) for base in (1, 2, 5))

# name, what it says, which field of EngineStats or how to make it of several
_Read: TypeAlias = str | Callable[[EngineStats], float]
_GAUGES: tuple[tuple[str, str, _Read], ...] = (
    ("num_requests_running", "Requests in the batch.", "num_running_requests"),
    (
        "num_requests_waiting",
        "Requests waiting to be run, preempted ones included.",
        "num_queued_requests",
    ),
    ("num_requests_max", "Most requests that the batch may hold.", "max_num_active_requests"),
    (
        "kv_cache_usage_perc",
        "Share of the KV cache's blocks that requests hold; 1 is all.",
        lambda stats: stats.used_num_blocks / stats.max_num_blocks if stats.max_num_blocks else 0.0,
    ),
    ("kv_cache_blocks_max", "Blocks of the KV cache.", "max_num_blocks"),
    ("kv_cache_blocks_used", "Blocks that requests hold.", "used_num_blocks"),
    ("kv_cache_blocks_free", "Blocks that no request holds.", "free_num_blocks"),
    ("kv_cache_blocks_cached", "Free blocks that are kept for reuse.", "cached_num_blocks"),
    ("kv_cache_block_tokens", "Tokens of one block.", "tokens_per_block"),
    (
        "kv_cache_hit_rate",
        "Share of the full prompt blocks that were reused.",
        lambda stats: stats.cache_hit_rate,
    ),
    ("iteration_latency_seconds", "Of the last step.", "last_step_s"),
    (
        "iteration_scheduled_requests",
        "Requests that computed something in the last step.",
        "iter_scheduled_requests",
    ),
    ("iteration_context_requests", "Of these, prefills.", "iter_context_requests"),
    ("iteration_generation_requests", "Of these, decodes.", "iter_gen_requests"),
    ("iteration_paused_requests", "Requests that the last step paused.", "iter_paused_requests"),
    (
        "iteration_context_tokens",
        "Prompt tokens computed in the last step.",
        "iter_context_tokens",
    ),
    (
        "iteration_decoded_tokens",
        "Tokens that the decodes of the last step brought.",
        "iter_decoded_tokens",
    ),
    (
        "iteration_decoded_tokens_per_request",
        "The same per decode: above 1 where guesses were right.",
        lambda stats: stats.iter_decoded_tokens / max(stats.iter_gen_requests, 1),
    ),
    (
        "iteration_new_requests",
        "Requests that ran for the first time in the last step.",
        "iter_new_requests",
    ),
    (
        "iteration_new_requests_queue_time_seconds",
        "How long these had waited, all together.",
        "iter_queue_s",
    ),
)
_COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    (
        "num_preemptions",
        "Requests paused because the KV cache was full.",
        "num_preemptions",
    ),
    ("iterations", "Steps that computed something.", "num_steps"),
    (
        "engine_requests_completed",
        "Requests that the engine ended, each of n by itself.",
        "num_completed_requests",
    ),
    ("prompt_tokens", "Prompt tokens of admitted requests.", "prompt_tokens"),
    ("generation_tokens", "Generated tokens.", "generation_tokens"),
    (
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        "prefix_cache_queries_tokens",
    ),
    (
        "prefix_cache_hits",
        "Prompt tokens found in the prefix cache.",
        "prefix_cache_hits_tokens",
    ),
    (
        "kv_cache_blocks_allocated",
        "Blocks given to requests, reused ones included.",
        "alloc_total_blocks",
    ),
    ("kv_cache_blocks_allocated_new", "Of these, not reused.", "alloc_new_blocks"),
    ("kv_cache_blocks_reused", "Full prompt blocks that were reused.", "reused_blocks"),
    ("kv_cache_blocks_missed", "Full prompt blocks that were computed.", "missed_blocks"),
    ("spec_decode_num_drafts", "Times that guesses were verified.", "num_drafts"),
    ("spec_decode_num_draft_tokens", "Guesses that were verified.", "num_draft_tokens"),
    (
        "spec_decode_num_accepted_tokens",
        "Guesses that were right.",
        "num_accepted_draft_tokens",
    ),
)


class Metrics:
    """All metrics of a server, in a registry of their own. It is a ``RequestObserver``."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self.registry = CollectorRegistry()
        self._engine = _EngineCollector(model_name)
        self.registry.register(self._engine)
        ProcessCollector(registry=self.registry)
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "From request to first token.", _REQUEST_BUCKETS_S
        )
        self._itl = self._histogram(
            "inter_token_latency_seconds", "From token to token of an answer.", _TOKEN_BUCKETS_S
        )
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time per token after the first, of an ended answer.",
            _TOKEN_BUCKETS_S,
        )
        self._end_to_end = self._histogram(
            "e2e_request_latency_seconds", "From request to the answer's end.", _REQUEST_BUCKETS_S
        )
        self._queue = self._histogram(
            "request_queue_time_seconds", "Waiting for the first step.", _REQUEST_BUCKETS_S
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From first step to first token.", _REQUEST_BUCKETS_S
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "From first to last token.", _REQUEST_BUCKETS_S
        )
        self._prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of an ended answer.", _COUNT_BUCKETS
        )
        self._generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens of an ended answer.", _COUNT_BUCKETS
        )
        self._success = Counter(
            f"{_PREFIX}request_success",
            "Ended answers by finish reason; timeouts, aborts and errors are counted too.",
            (_LABEL, _REASON),
            registry=self.registry,
        )
        for reason in ("stop", "length", "timeout", "abort", "error"):
            self._success.labels(model_name, reason)
        self._load = Gauge(
            f"{_PREFIX}model_load_seconds",
            "From the engine's start until it was loaded and warm.",
            (_LABEL,),
            registry=self.registry,
        )

    def first_token(self, ttft_s: float) -> None:
        """See ``RequestObserver``."""
        self._ttft.observe(ttft_s)

    def next_tokens(self, itl_s: float) -> None:
        """See ``RequestObserver``."""
        self._itl.observe(itl_s)

    def finished(self, times: AnswerTimes) -> None:
        """See ``RequestObserver``."""
        self._success.labels(self._model_name, times.finish_reason).inc()
        self._end_to_end.observe(times.end_s)
        self._prompt_tokens.observe(times.prompt_tokens)
        self._generation_tokens.observe(times.generation_tokens)
        if times.first_token_s is None:
            return
        self._queue.observe(times.queue_s)
        self._prefill.observe(max(times.first_token_s - times.queue_s, 0.0))
        decode_s = times.end_s - times.first_token_s
        self._decode.observe(decode_s)
        if times.generation_tokens > 1:
            self._tpot.observe(decode_s / (times.generation_tokens - 1))

    def loaded(self, load_s: float) -> None:
        """The engine is ready after so many seconds."""
        self._load.labels(self._model_name).set(load_s)

    def render(self, stats: EngineStats) -> bytes:
        """Prometheus text, with these numbers of the engine."""
        self._engine.stats = stats
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            _PREFIX + name, text, (_LABEL,), buckets=buckets, registry=self.registry
        )
        return histogram.labels(self._model_name)


class _EngineCollector(Collector):
    """The engine's last snapshot as metrics."""

    def __init__(self, model_name: str) -> None:
        self.stats = EngineStats()
        self._labels = (model_name,)

    def collect(self) -> Iterator[Metric]:
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(_PREFIX + name, text, labels=(_LABEL,))
            gauge.add_metric(self._labels, self._value(read))
            yield gauge
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(_PREFIX + name, text, labels=(_LABEL,))
            counter.add_metric(self._labels, self._value(read))
            yield counter
        finished = CounterMetricFamily(
            f"{_PREFIX}engine_requests_finished",
            "Requests that the engine ended, by finish reason.",
            labels=(_LABEL, _REASON),
        )
        for reason, count in self.stats.finished.items():
            finished.add_metric((*self._labels, reason), count)
        yield finished

    def _value(self, read: _Read) -> float:
        return float(getattr(self.stats, read)) if isinstance(read, str) else read(self.stats)
