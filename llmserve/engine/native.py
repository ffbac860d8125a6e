"""The native engine's core: a scheduler and a model runner, driven a step at a time.

It owns the two and the KV pool's size, and knows neither processes nor asyncio. One request's
fault comes out as that request's error output; an exception out of ``step`` is the engine's own
fault, and whoever drives the core has to give it up.
"""

from __future__ import annotations

import os
import time

from llmserve.config import EngineConfig
from llmserve.core.kv_cache_manager import KVCacheManager
from llmserve.core.request import Output, Request
from llmserve.core.scheduler import Scheduler
from llmserve.core.stats import EngineStats
from llmserve.engine.admission import check_request
from llmserve.engine.engine import EngineInfo
from llmserve.engine.sizing import EngineLimits, kv_pool_bytes, num_kv_blocks
from llmserve.runtime.host import free_host_bytes
from llmserve.runtime.model_runner import ModelRunner


class EngineCore:
    """Serves requests on one model. Not thread-safe; ``step`` blocks for as long as a step takes.

    Attributes:
        info: What the engine is and holds; ``load_s`` is 0, for the core did not do the loading.
    """

    info: EngineInfo

    def __init__(self, runner: ModelRunner, limits: EngineLimits, config: EngineConfig) -> None:
        """Size and allocate the KV pool and warm up.

        Args:
            runner: A loaded model without a KV cache; the core owns it from here on.
            limits: Of ``resolve_limits``.
            config: For the KV cache and the scheduler; its limits are not looked at again.

        Raises:
            ConfigError: The pool would not hold one request of max_seq_len tokens.
        """
        model = runner.info
        pool_bytes = kv_pool_bytes(
            config.kv_cache,
            device=model.device,
            available_bytes=runner.available_kv_bytes(),
            free_host_bytes=max(0, free_host_bytes() - model.workspace_bytes),
        )
        blocks = num_kv_blocks(model.kv_groups, limits, config.kv_cache, pool_bytes)
        num_blocks = (blocks,) * len(model.kv_groups)
        runner.allocate_kv_cache(num_blocks)
        runner.warm_up()
        self._runner = runner
        self._scheduler = Scheduler(
            max_batch_size=limits.max_batch_size,
            max_num_tokens=limits.max_num_tokens,
            max_seq_len=limits.max_seq_len,
            kv=KVCacheManager(
                model.kv_groups,
                num_blocks,
                limits.tokens_per_block,
                config.kv_cache.enable_block_reuse,
            ),
            policy=config.capacity_scheduler_policy,
            enable_chunked_prefill=config.enable_chunked_prefill,
            max_queue_size=config.max_queue_size,
        )
        self._last_step_s = 0.0
        self.info = EngineInfo(
            backend="native",
            device=model.device,
            dtype=model.dtype,
            quant_algo=model.quant_algo,
            vocab_size=model.vocab_size,
            max_batch_size=limits.max_batch_size,
            max_num_tokens=limits.max_num_tokens,
            max_seq_len=limits.max_seq_len,
            tokens_per_block=limits.tokens_per_block,
            num_kv_blocks=blocks,
            kv_cache_bytes=blocks * sum(group.bytes_per_block for group in model.kv_groups),
            weights_bytes=model.weights_bytes,
            load_s=0.0,
            pid=os.getpid(),
        )

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: It can never be served.
            EngineOverloadedError: The queue is full.
        """
        check_request(request, self.info)
        self._scheduler.add_request(request, time.monotonic())

    def abort_request(self, request_id: str) -> Output | None:
        """End a request and free its blocks: its last output, or None if there is no such one."""
        return self._scheduler.abort_request(request_id)

    def has_unfinished_requests(self) -> bool:
        """Whether ``step`` has anything to do."""
        return self._scheduler.has_unfinished_requests()

    def step(self) -> list[Output]:
        """Schedule, execute, update: one token for every running request, and prompts besides."""
        begun_s = time.monotonic()
        scheduler_output = self._scheduler.schedule(begun_s)
        handle = self._runner.launch(scheduler_output)
        # Between the two, the next step's schedule can overlap this one's execution.
        runner_output = self._runner.finish(handle)
        outputs = self._scheduler.update_from_output(scheduler_output, runner_output)
        self._last_step_s = time.monotonic() - begun_s
        return outputs

    def stats(self) -> EngineStats:
        """A snapshot of the scheduler's and the pool's, with the last step's wall time."""
        stats = self._scheduler.snapshot()
        stats.last_step_s = self._last_step_s
        return stats

    def check_integrity(self) -> None:
        """Raise if the pool's books do not balance. For whenever the engine is idle."""
        self._scheduler.check_integrity()

    def shutdown(self) -> None:
        """Free the model and the pool. No call after this one."""
        self._runner.shutdown()
