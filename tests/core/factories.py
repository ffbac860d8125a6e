"""Short ways to a scheduler with a fake runner below it, and to requests for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmserve.config import CapacitySchedulerPolicy
from llmserve.core.kv_cache_manager import KVCacheManager
from llmserve.core.request import FinishReason, Output, Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler import Scheduler
from llmserve.core.step import SchedulerOutput
from llmserve.runtime.fake import FakeRunner


def create_request(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int | None = 8,
    *,
    eos_token_ids: tuple[int, ...] = (),
    stop_token_ids: tuple[int, ...] = (),
    cache_salt: str | None = None,
    priority: int = 0,
    ignore_eos: bool = False,
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling_params=SamplingParams(
            max_tokens=max_tokens, seed=0, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos
        ),
        eos_token_ids=eos_token_ids,
        cache_salt=cache_salt,
        priority=priority,
    )


def create_requests(count: int, prompt_tokens: int = 6, max_tokens: int = 8) -> list[Request]:
    """Requests "0", "1", ... whose prompts have nothing in common."""
    return [
        create_request(str(i), [100 * i + t for t in range(prompt_tokens)], max_tokens)
        for i in range(count)
    ]


@dataclass
class Loop:
    """A scheduler and a runner, stepped by hand; remembers what came out of them."""

    scheduler: Scheduler
    runner: FakeRunner
    kv: KVCacheManager
    now_s: float = 0.0
    tokens: dict[str, list[int]] = field(default_factory=dict)
    ended: dict[str, Output] = field(default_factory=dict)

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add_request(request, self.now_s)
            self.tokens[request.request_id] = []

    def abort(self, request_id: str) -> Output | None:
        output = self.scheduler.abort_request(request_id)
        if output is not None:
            assert output.finish_reason is FinishReason.ABORT
            self.take([output])
        return output

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert output.request_id not in self.ended, "an output after the last one"
            self.tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.ended[output.request_id] = output

    def step(self, mid_step: Callable[[], object] = lambda: None) -> SchedulerOutput:
        """One step; ``mid_step`` is called while it is under way."""
        self.now_s += 1.0
        step = self.scheduler.schedule(self.now_s)
        self.scheduler.check_integrity()
        handle = self.runner.launch(step)
        mid_step()
        self.scheduler.check_integrity()
        self.take(self.scheduler.update_from_output(step, self.runner.finish(handle)))
        self.scheduler.check_integrity()
        return step

    def run(self, max_steps: int = 1000) -> list[SchedulerOutput]:
        """Step until every request has ended."""
        steps = []
        while self.scheduler.has_unfinished_requests():
            steps.append(self.step())
            assert steps[-1].scheduled, "there are requests, and nothing runs"
            assert len(steps) <= max_steps, "a request is starved"
        return steps


def create_loop(
    *,
    num_blocks: int | tuple[int, ...] = 64,
    tokens_per_block: int = 4,
    max_batch_size: int = 8,
    max_num_tokens: int = 64,
    max_seq_len: int = 256,
    policy: CapacitySchedulerPolicy = "guaranteed_no_evict",
    enable_block_reuse: bool = True,
    enable_chunked_prefill: bool = True,
    max_queue_size: int = 64,
    vocab_size: int = 256,
    errors: dict[str, str] | None = None,
) -> Loop:
    pools = (num_blocks,) if isinstance(num_blocks, int) else num_blocks
    runner = FakeRunner(
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        tokens_per_block=tokens_per_block,
        num_groups=len(pools),
        vocab_size=vocab_size,
        errors=errors,
    )
    runner.allocate_kv_cache(pools)
    kv = KVCacheManager(runner.info.kv_groups, pools, tokens_per_block, enable_block_reuse)
    scheduler = Scheduler(
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        kv=kv,
        policy=policy,
        enable_chunked_prefill=enable_chunked_prefill,
        max_queue_size=max_queue_size,
    )
    return Loop(scheduler, runner, kv)


def create_scheduler(**settings: object) -> Scheduler:
    """A scheduler alone, for tests that write the runner's answers themselves."""
    return create_loop(**settings).scheduler  # type: ignore[arg-type]


def scheduled_tokens(step: SchedulerOutput) -> dict[str, int]:
    """How many tokens each request of a step computes, in the order of the step."""
    return {scheduled.request_id: scheduled.num_tokens for scheduled in step.scheduled}
