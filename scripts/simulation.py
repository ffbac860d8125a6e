"""A discrete-event simulation of serving: the real scheduler and KV cache, an invented device.

What is real is everything that decides: ``Scheduler`` and ``KVCacheManager``, driven as the engine
drives them, a step scheduled ahead while another computes. What is invented is the rest: a
``Device`` says how long a step takes, a ``Workload`` who asks for what and when, and tokens are
numbers without a meaning. The clock is simulated, so a day of traffic takes minutes.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from statistics import fmean

from llmserve.config import CapacitySchedulerPolicy
from llmserve.core.kv_cache_manager import KVCacheManager
from llmserve.core.request import BATCH_PRIORITY, INTERACTIVE_PRIORITY, FinishReason, Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler import Scheduler
from llmserve.core.stats import EngineStats
from llmserve.core.step import KVGroupSpec, ModelRunnerOutput, SchedulerOutput
from llmserve.engine.native import calm_collector

EOS = 0
_FIRST_TOKEN = 1


@dataclass(frozen=True, kw_only=True)
class Device:
    """A model on a machine: what a step costs, and how much fits.

    Attributes:
        name: Of both.
        weights_bytes: Read once in every step.
        flops_per_token: Of all products with weights.
        attention_flops: Per pair of a computed token and one it sees.
        kv_bytes_per_token: K and V of all layers.
        bytes_per_s: Speed of reading weights and K and V.
        flops_per_s: Speed of products.
        overhead_s: Of a step, whatever it computes.
        kv_cache_bytes: Size of the KV pool.
        max_batch_size: As the engine's.
        max_num_tokens: As the engine's.
    """

    name: str
    weights_bytes: float
    flops_per_token: float
    attention_flops: float
    kv_bytes_per_token: float
    bytes_per_s: float
    flops_per_s: float
    overhead_s: float
    kv_cache_bytes: float
    max_batch_size: int
    max_num_tokens: int

    def step_s(self, num_tokens: int, num_seen_tokens: int, num_pairs: int) -> float:
        """How long a step takes, in seconds.

        Args:
            num_tokens: It computes so many.
            num_seen_tokens: Of all requests' contexts together: read once each.
            num_pairs: Over all computed tokens, how many tokens each sees.
        """
        weights_s = max(
            self.weights_bytes / self.bytes_per_s,
            num_tokens * self.flops_per_token / self.flops_per_s,
        )
        attention_s = max(
            num_seen_tokens * self.kv_bytes_per_token / self.bytes_per_s,
            num_pairs * self.attention_flops / self.flops_per_s,
        )
        return self.overhead_s + weights_s + attention_s


# A Xeon with AMX, 2 threads, and the 1b Llama of 1034.5 M weights that was measured on it: INT8
# weights from memory at 29.5 GB/s, products at 1.5 TOP/s (2048 x 5632 with 64 rows: 0.945 ms), and
# what a 20-tokens/s engine adds to the 35 ms that the weights take. 22 layers, 4 KV heads of 64,
# fp32 K and V, the default pool of 4 GiB.
CPU = Device(
    name="1b INT8, CPU of 2 cores",
    weights_bytes=1.0345e9,
    flops_per_token=2 * 1.0345e9,
    attention_flops=4 * 22 * 2048,
    kv_bytes_per_token=22 * 2 * 256 * 4,
    bytes_per_s=29.5e9,
    flops_per_s=1.5e12,
    overhead_s=0.015,
    kv_cache_bytes=4 * 2**30,
    max_batch_size=64,
    max_num_tokens=1024,
)

# Llama-3.1-8B: FP8 weights and bf16 lm_head from memory at 4.3 TB/s, products at 1.2 PFLOP/s. The
# overhead is what NIM's 4.6 ms between tokens leave beside reading bf16 weights. 32 layers, 8 KV
# heads of 128, bf16 K and V, nine tenths of what is free of 139 GiB.
H200 = Device(
    name="8B FP8, H200",
    weights_bytes=8.03e9,
    flops_per_token=2 * 7.5e9,
    attention_flops=4 * 32 * 4096,
    kv_bytes_per_token=32 * 2 * 1024 * 2,
    bytes_per_s=4.3e12,
    flops_per_s=1.2e15,
    overhead_s=0.0011,
    kv_cache_bytes=0.9 * (139 * 2**30 - 10e9),
    max_batch_size=1024,
    max_num_tokens=8192,
)

DEVICES = {"cpu": CPU, "h200": H200}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Who asks for what, and when.

    A prompt is a path through a tree and a question: one of ``num_systems`` system prompts, the
    popular ones far more often than others, one of the documents that belong to it, and what
    nobody asked before. Lengths are lognormal. An answer ends by itself, at a length that the
    scheduler does not know, or at ``max_tokens``.

    Attributes:
        requests_per_s: Mean rate.
        burstiness: Coefficient of variation of the time between two requests: 1 is Poisson.
        num_requests: How many there are.
        batch_share: How many of them have the priority of batch jobs.
        num_systems: System prompts.
        num_documents: For each of these.
        system_tokens: Median length.
        document_tokens: Median length.
        question_tokens: Median length.
        answer_tokens: Median length.
        spread: Sigma of all lengths' logarithm.
        max_tokens: Longest answer.
        max_prompt_tokens: Longer questions are cut.
        seed: Of everything.
    """

    requests_per_s: float
    burstiness: float = 1.0
    num_requests: int = 2000
    batch_share: float = 0.2
    num_systems: int = 20
    num_documents: int = 20
    system_tokens: int = 200
    document_tokens: int = 300
    question_tokens: int = 80
    answer_tokens: int = 120
    spread: float = 0.7
    max_tokens: int = 512
    max_prompt_tokens: int = 3072
    seed: int = 0

    def requests(self) -> Iterator[tuple[float, Request, int]]:
        """In the order of their arrival: the time in seconds, the request, its answer's length."""
        rng = random.Random(self.seed)
        shape = 1 / self.burstiness**2
        next_token = _FIRST_TOKEN

        def text(median: int) -> tuple[int, ...]:
            nonlocal next_token
            length = max(1, round(rng.lognormvariate(0, self.spread) * median))
            next_token += length
            return tuple(range(next_token - length, next_token))

        systems = [text(self.system_tokens) for _ in range(self.num_systems)]
        documents = [
            [text(self.document_tokens) for _ in range(self.num_documents)] for _ in systems
        ]
        popularity = [1 / rank for rank in range(1, self.num_systems + 1)]
        now_s = 0.0
        for i in range(self.num_requests):
            now_s += rng.gammavariate(shape, 1 / shape / self.requests_per_s)
            (system,) = rng.choices(range(self.num_systems), popularity)
            prompt = systems[system] + rng.choice(documents[system]) + text(self.question_tokens)
            answer_tokens = round(rng.lognormvariate(0, self.spread) * self.answer_tokens)
            in_batch = rng.random() < self.batch_share
            request = Request(
                request_id=str(i),
                prompt_token_ids=prompt[-self.max_prompt_tokens :],
                sampling_params=SamplingParams(max_tokens=self.max_tokens, seed=0),
                eos_token_ids=(EOS,),
                priority=BATCH_PRIORITY if in_batch else INTERACTIVE_PRIORITY,
            )
            yield now_s, request, min(max(1, answer_tokens), self.max_tokens)


@dataclass
class _Life:
    """One request's, from arrival to end."""

    arrival_s: float
    is_batch: bool
    num_prompt_tokens: int
    num_tokens: int  # that will come
    num_sampled: int = 0  # by the device
    first_s: float = 0.0
    end_s: float = 0.0


@dataclass
class Report:
    """What came out.

    Attributes:
        duration_s: Simulated, from the first arrival to the last end.
        lives: Of all requests.
        stats: The scheduler's.
        scheduling_s: Of each step that computed something, schedule plus update, in seconds of the
            thread's CPU time: wall time, were the machine idle otherwise.
        batch_sizes: Requests in each of these steps.
        wall_s: Wall time of the whole simulation.
    """

    duration_s: float
    lives: list[_Life]
    stats: EngineStats
    scheduling_s: list[float] = field(repr=False)
    batch_sizes: list[int] = field(repr=False)
    wall_s: float

    @property
    def output_tokens_per_s(self) -> float:
        """Over the whole time."""
        return sum(life.num_tokens for life in self.lives) / self.duration_s

    @property
    def rate(self) -> float:
        """Requests served per second, over the middle half of all ends."""
        ends = sorted(life.end_s for life in self.lives)
        first, last = len(ends) // 4, len(ends) * 3 // 4
        return (last - first) / max(1e-9, ends[last] - ends[first])

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that were found in the cache."""
        return self.stats.prefix_cache_hits_tokens / max(1, self.stats.prefix_cache_queries_tokens)

    def ttft_s(self, share: float, *, batch: bool = False) -> float:
        """Percentile of the time to the first token, of interactive requests or of batch jobs."""
        return percentile(
            [x.first_s - x.arrival_s for x in self.lives if x.is_batch == batch], share
        )

    def tpot_s(self, share: float) -> float:
        """Percentile over requests of the mean time between two tokens after the first."""
        means = [
            (life.end_s - life.first_s) / (life.num_tokens - 1)
            for life in self.lives
            if life.num_tokens > 1
        ]
        return percentile(means, share)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that ``share`` of all do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class Simulation:
    """Serves one workload under one policy.

    Args:
        device: Says how long steps take.
        policy: The scheduler's.
        tokens_per_block: The KV cache's.
        kv_cache_share: Of the device's KV pool.
        max_seq_len: The scheduler's.
    """

    def __init__(
        self,
        device: Device,
        policy: CapacitySchedulerPolicy,
        *,
        tokens_per_block: int = 32,
        kv_cache_share: float = 1.0,
        max_seq_len: int = 4096,
    ) -> None:
        bytes_per_block = device.kv_bytes_per_token * tokens_per_block
        num_blocks = int(device.kv_cache_bytes * kv_cache_share / bytes_per_block)
        group = KVGroupSpec(layers=(0,), window=None, bytes_per_block=int(bytes_per_block))
        kv = KVCacheManager(
            (group,), (num_blocks,), tokens_per_block, max_step_tokens=device.max_num_tokens
        )
        self.device = device
        self.scheduler = Scheduler(
            max_batch_size=device.max_batch_size,
            max_num_tokens=device.max_num_tokens,
            max_seq_len=max_seq_len,
            kv=kv,
            policy=policy,
            enable_chunked_prefill=True,
            max_queue_size=10**9,
        )
        self.now_s = 0.0
        self.lives: dict[str, _Life] = {}
        self._under_way: deque[tuple[SchedulerOutput, float]] = deque()
        self._num_tokens: dict[str, int] = {}  # prompt and sampled, of requests that run
        self.scheduling_s: list[float] = []
        self.batch_sizes: list[int] = []

    def run(self, workload: Workload) -> Report:
        """Serve it to the end."""
        start = time.perf_counter()
        arrivals = workload.requests()
        coming = next(arrivals, None)
        while coming is not None or self.scheduler.has_unfinished_requests() or self._under_way:
            if not self.scheduler.has_unfinished_requests() and not self._under_way:
                assert coming is not None
                self.now_s = max(self.now_s, coming[0])
            while coming is not None and coming[0] <= self.now_s:
                self._add(*coming)
                coming = next(arrivals, None)
            self.step()
        return Report(
            duration_s=self.now_s,
            lives=list(self.lives.values()),
            stats=self.scheduler.snapshot(),
            scheduling_s=self.scheduling_s,
            batch_sizes=self.batch_sizes,
            wall_s=time.perf_counter() - start,
        )

    def step(self) -> None:
        """The device is free: schedule up to one step ahead of the one that it executes now."""
        scheduler = self.scheduler
        while scheduler.has_unfinished_requests() and len(self._under_way) < 2:
            if self._under_way and not scheduler.may_run_ahead:
                break
            start = time.thread_time()
            step = scheduler.schedule(self.now_s)
            self._under_way.append((step, time.thread_time() - start))
        step, schedule_s = self._under_way.popleft()
        output = self._execute(step)
        start = time.thread_time()
        outputs = scheduler.update_from_output(step, output)
        if step.num_requests:
            self.scheduling_s.append(schedule_s + time.thread_time() - start)
            self.batch_sizes.append(step.num_requests)
        for out in outputs:
            life = self.lives[out.request_id]
            life.first_s = life.first_s or self.now_s
            if out.finish_reason is not None:
                assert out.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), out
                life.end_s = self.now_s

    def add(self, request: Request, answer_tokens: int) -> None:
        """A request comes, whose answer will have so many tokens."""
        self._add(self.now_s, request, answer_tokens)

    def _add(self, arrival_s: float, request: Request, answer_tokens: int) -> None:
        self.scheduler.add_request(request, arrival_s)
        self.lives[request.request_id] = _Life(
            arrival_s,
            request.priority == BATCH_PRIORITY,
            len(request.prompt_token_ids),
            answer_tokens,
        )

    def _execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        # A token is EOS where the answer ends, and anything else before that.
        lives, lengths = self.lives, self._num_tokens
        for request_id in step.finished_request_ids:
            del lengths[request_id]
        for new in step.new_requests:
            lengths[new.request_id] = len(new.token_ids)
        sampled: dict[str, list[int]] = {}
        num_seen = num_pairs = 0
        sampling = list(step.decodes)
        for prefill in step.prefills:
            stop = prefill.num_computed_tokens + prefill.num_tokens
            num_seen += stop
            num_pairs += prefill.num_tokens * (prefill.num_computed_tokens + stop) // 2
            if stop == lengths[prefill.request_id]:
                sampling.append(prefill.request_id)
        for request_id in step.decodes:
            num_seen += lengths[request_id]
        for request_id in sampling:
            life = lives[request_id]
            life.num_sampled += 1
            lengths[request_id] += 1
            ends = life.num_sampled >= life.num_tokens
            sampled[request_id] = [EOS if ends else step.step_id + _FIRST_TOKEN]
        if step.num_requests:
            pairs = num_pairs + num_seen
            self.now_s += self.device.step_s(step.num_tokens, num_seen, pairs)
        return ModelRunnerOutput(token_ids=sampled)


def measure_overhead(num_running: int, num_steps: int, *, answer_tokens: int) -> list[float]:
    """CPU time of schedule plus update, in seconds, of each of so many steps.

    Args:
        num_running: Requests in the batch. Whenever one ends, the next one starts.
        num_steps: Steps to measure, after all prompts of the first batch are computed.
        answer_tokens: Of each request, so that on average num_running / answer_tokens end in a
            step.
    """
    device = replace(
        H200,
        max_batch_size=num_running,
        max_num_tokens=8 * num_running + 4096,
        kv_cache_bytes=num_running * (answer_tokens + 256) * H200.kv_bytes_per_token,
    )
    simulation = Simulation(device, "guaranteed_no_evict")
    rng = random.Random(0)

    def fill() -> None:
        stats = simulation.scheduler.snapshot()
        for _ in range(num_running - stats.num_running_requests - stats.num_queued_requests):
            i = len(simulation.lives)
            request = Request(
                request_id=str(i),
                prompt_token_ids=tuple(range(1000 * i + 1, 1000 * i + 129)),
                sampling_params=SamplingParams(max_tokens=answer_tokens + 1, seed=0),
                eos_token_ids=(EOS,),
            )
            # The first ones are met in the middle of their answers.
            first = i < num_running
            simulation.add(request, rng.randint(1, answer_tokens) if first else answer_tokens)

    while simulation.scheduler.snapshot().num_running_requests < num_running:
        fill()
        simulation.step()
    calm_collector()  # as the engine's process does
    before = len(simulation.scheduling_s)
    while len(simulation.scheduling_s) < before + num_steps:
        fill()
        simulation.step()
    assert fmean(simulation.batch_sizes[before:]) > 0.95 * num_running
    return simulation.scheduling_s[before:]
