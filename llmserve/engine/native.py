"""The native engine's core: a scheduler and a model runner, with two steps under way.

It owns the two and the KV pool's size, and knows neither processes nor asyncio. One request's
fault comes out as that request's error output; an exception out of ``collect`` is the engine's own
fault, and whoever drives the core has to give it up.
"""

from __future__ import annotations

import gc
import os
import time
from collections import deque
from collections.abc import Callable

from llmserve.config import EngineConfig
from llmserve.core.constraint import TokenConstraint
from llmserve.core.kv_cache_manager import KVCacheManager
from llmserve.core.request import Output, Request
from llmserve.core.scheduler import Scheduler
from llmserve.core.speculation import NgramProposer, Speculator
from llmserve.core.stats import EngineStats
from llmserve.engine.admission import check_request
from llmserve.engine.engine import EngineInfo
from llmserve.engine.sizing import (
    EngineLimits,
    kv_bytes,
    kv_pool_bytes,
    num_kv_blocks,
    request_blocks,
)
from llmserve.engine.step_thread import PendingStep, StepThread
from llmserve.engine.structured_output import StructuredOutput
from llmserve.errors import InvalidRequestError
from llmserve.runtime.host import free_host_bytes
from llmserve.runtime.model_runner import ModelRunner


def calm_collector() -> None:
    """Make Python's garbage collector rare, in a process that has loaded all it serves with.

    What is there stays, and need not be looked at again: with torch loaded, a full collection holds
    up every thread for tenths of a second. A step makes an object for each running request, so the
    collector's own thresholds would have it run several times in each.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


class EngineCore:
    """Serves requests on one model. Not thread-safe; the model computes in a thread of its own.

    Attributes:
        info: What the engine is and holds; ``load_s`` is 0, for the core did not do the loading.
    """

    info: EngineInfo

    def __init__(
        self,
        runner: ModelRunner,
        limits: EngineLimits,
        config: EngineConfig,
        *,
        structured_output: StructuredOutput | None = None,
        on_step_done: Callable[[], None] = lambda: None,
    ) -> None:
        """Size and allocate the KV pool and warm up.

        Args:
            runner: A loaded model without a KV cache; the core owns it from here on.
            limits: Of ``resolve_limits``.
            config: For the KV cache and the scheduler; its limits are not looked at again.
            structured_output: Of the model's tokenizer; None: guided decoding is refused.
            on_step_done: Called, on another thread, when ``step_is_done`` has become true.

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
        num_blocks = num_kv_blocks(model.kv_groups, limits, config.kv_cache, pool_bytes)
        runner.allocate_kv_cache(num_blocks)
        self._thread = StepThread(runner, on_step_done)
        # Where it will compute: its threads of OpenMP are that thread's own.
        self._thread.call(runner.warm_up)
        self._under_way: deque[PendingStep] = deque()  # the oldest first, two at most
        self._structured_output = structured_output
        self._speculator = (
            Speculator(NgramProposer(config.speculative)) if config.speculative else None
        )
        kv = KVCacheManager(
            model.kv_groups,
            num_blocks,
            limits.tokens_per_block,
            max_step_tokens=limits.max_num_tokens,
            enable_block_reuse=config.kv_cache.enable_block_reuse,
            enable_partial_reuse=config.kv_cache.enable_partial_reuse,
        )
        self._scheduler = Scheduler(
            max_batch_size=limits.max_batch_size,
            max_num_tokens=limits.max_num_tokens,
            max_seq_len=limits.max_seq_len,
            kv=kv,
            policy=config.capacity_scheduler_policy,
            enable_chunked_prefill=config.enable_chunked_prefill,
            max_queue_size=config.max_queue_size,
            speculator=self._speculator,
        )
        self._last_step_s = 0.0
        self._result_s: float | None = None  # when the last step came back, unless a rest followed
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
            num_kv_blocks=sum(num_blocks),
            kv_cache_bytes=kv_bytes(model.kv_groups, num_blocks),
            weights_bytes=model.weights_bytes,
            load_s=0.0,
            pid=os.getpid(),
            blocks_per_full_request=sum(request_blocks(model.kv_groups, limits)),
        )

    # --- requests -------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: It can never be served.
            EngineOverloadedError: The queue is full.
        """
        check_request(request, self.info)
        self._scheduler.add_request(request, time.monotonic(), self._constraint(request))

    def abort_request(self, request_id: str) -> Output | None:
        """End a request and free its blocks: its last output, or None if there is no such one."""
        return self._scheduler.abort_request(request_id)

    def expire_requests(self) -> list[Output]:
        """End the requests whose timeout has passed: their last outputs."""
        return self._scheduler.expire(time.monotonic())

    def has_unfinished_requests(self) -> bool:
        """Whether a request is waiting or running."""
        return self._scheduler.has_unfinished_requests()

    def _constraint(self, request: Request) -> TokenConstraint | None:
        params = request.sampling_params.guided_decoding
        if params is None:
            return None
        if self._structured_output is None:
            raise InvalidRequestError(
                "guided_decoding needs a tokenizer, and this engine has none",
                param="guided_decoding",
            )
        return self._structured_output.compile(params, request.eos_token_ids)

    # --- steps ----------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """One step further: a token for every running request, and prompts besides.

        The next step is scheduled while this one computes, so what is added now may have to wait
        for it.
        """
        outputs = self.expire_requests()
        self.launch()
        return outputs + self.collect()

    def launch(self) -> None:
        """Keep the model busy: one step computes, and behind it the next one is ready."""
        if not self._under_way:
            self._launch_next()
        if self._under_way:
            self._give_masks(self._under_way[0])
        if len(self._under_way) == 1 and self._scheduler.may_run_ahead:
            self._launch_next()

    def step_is_under_way(self) -> bool:
        """Whether there is a step to ``collect``. It may be nobody's any more."""
        return bool(self._under_way)

    def step_is_done(self) -> bool:
        """Whether ``collect`` returns at once, with something."""
        return bool(self._under_way) and self._under_way[0].is_done

    def collect(self) -> list[Output]:
        """Wait for the oldest step under way and take in what it brought.

        Raises:
            Exception: What the runner raised.
        """
        if not self._under_way:
            return []
        pending = self._under_way.popleft()
        runner_output = pending.result()
        outputs = self._scheduler.update_from_output(pending.scheduler_output, runner_output)
        self._observe(pending)
        if not self._under_way:  # nothing was scheduled ahead: before all else, the model goes on
            self._launch_next()
        return outputs

    def _launch_next(self) -> None:
        # A step ahead is for requests alone; of those that ended, the runner is told before a rest.
        scheduler = self._scheduler
        if scheduler.has_unfinished_requests() or (
            scheduler.has_finished_requests() and not self._under_way
        ):
            pending = self._thread.submit(scheduler.schedule(time.monotonic()))
            self._under_way.append(pending)
            if not scheduler.constraints(pending.scheduler_output):
                pending.set_masks({})

    def _observe(self, pending: PendingStep) -> None:
        step = pending.scheduler_output
        if step.num_tokens:  # else it only told the runner who has ended
            self._last_step_s = pending.model_s
        now_s, before_s = time.perf_counter(), self._result_s
        # What a guess costs is told by steps of decodes alone, the gap before them included.
        decodes = step.num_tokens > 0 and not step.prefills
        if self._speculator is not None and before_s is not None and decodes:
            self._speculator.observe_step(step.num_tokens, now_s - before_s)
        self._result_s = now_s if self._scheduler.has_unfinished_requests() else None

    def _give_masks(self, pending: PendingStep) -> None:
        """Say what a step may draw; all steps before it have been taken in."""
        if not pending.has_masks:
            constraints = self._scheduler.constraints(pending.scheduler_output)
            assert self._structured_output is not None
            pending.set_masks(self._structured_output.masks(constraints))

    # --- looking in, and the end ----------------------------------------------------------------

    def stats(self) -> EngineStats:
        """A snapshot of the scheduler's and the pool's, with the last step's time."""
        stats = self._scheduler.snapshot()
        stats.last_step_s = self._last_step_s
        return stats

    def check_integrity(self) -> None:
        """Raise if the pool's books do not balance. For whenever the engine is idle."""
        self._scheduler.check_integrity()

    def prepare(self) -> None:
        """Do in a pause what the first request that needs it would have to wait for."""
        if self._structured_output is not None:
            self._structured_output.warm_up()

    def shutdown(self) -> None:
        """Free the model and the pool once the steps under way are done. No call after this."""
        for pending in self._under_way:
            if not pending.has_masks:
                pending.set_masks({})
        self._thread.shutdown()
