"""Prometheus metrics, under the names that dashboards of other servers use after their prefix.

Histograms and the counts of ended answers are taken here, as a ``RequestObserver``; gauges and
token counters are the engine's own, read when they are scraped. Counters of the engine begin at
zero again when its process is restarted, as Prometheus expects of counters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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

_REQUEST_BUCKETS_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0),
)
_TOKEN_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1),
    *(0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0),
)
_COUNT_BUCKETS = tuple(float(base * 10**power) for power in range(6) for base in (1, 2, 5))

# name, what it says, how to read it
_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    (
        "num_requests_running",
        "Requests in the batch.",
        lambda stats: stats.num_running_requests,
    ),
    (
        "num_requests_waiting",
        "Requests waiting to be run, preempted ones included.",
        lambda stats: stats.num_queued_requests,
    ),
    (
        "kv_cache_usage_perc",
        "Share of the KV cache's blocks that requests hold; 1 is all.",
        lambda stats: stats.used_num_blocks / stats.max_num_blocks if stats.max_num_blocks else 0.0,
    ),
)
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    (
        "num_preemptions",
        "Requests paused because the KV cache was full.",
        lambda stats: stats.num_preemptions,
    ),
    (
        "prompt_tokens",
        "Prompt tokens of admitted requests.",
        lambda stats: stats.prompt_tokens,
    ),
    (
        "generation_tokens",
        "Generated tokens.",
        lambda stats: stats.generation_tokens,
    ),
    (
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda stats: stats.prefix_cache_queries_tokens,
    ),
    (
        "prefix_cache_hits",
        "Prompt tokens found in the prefix cache.",
        lambda stats: stats.prefix_cache_hits_tokens,
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
            "Ended answers by finish reason; aborts and errors are counted too.",
            (_LABEL, "finished_reason"),
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort", "error"):
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
            gauge.add_metric(self._labels, read(self.stats))
            yield gauge
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(_PREFIX + name, text, labels=(_LABEL,))
            counter.add_metric(self._labels, read(self.stats))
            yield counter
