"""Short ways to a scheduler with a fake runner below it, and to requests for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmserve.config import CapacitySchedulerPolicy
from llmserve.core.constraint import TokenConstraint
from llmserve.core.kv_cache_manager import KVCacheManager
from llmserve.core.request import (
    DEFAULT_RETENTION_PRIORITY,
    INTERACTIVE_PRIORITY,
    FinishReason,
    Output,
    Request,
    TokenLogprobs,
)
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler import Scheduler
from llmserve.core.speculation import Speculator
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
    priority: int = INTERACTIVE_PRIORITY,
    timeout_s: float | None = None,
    ignore_eos: bool = False,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    retention_priority: int = DEFAULT_RETENTION_PRIORITY,
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling_params=SamplingParams(
            max_tokens=max_tokens,
            seed=0,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        ),
        eos_token_ids=eos_token_ids,
        cache_salt=cache_salt,
        priority=priority,
        timeout_s=timeout_s,
        retention_priority=retention_priority,
    )


def create_requests(count: int, prompt_tokens: int = 6, max_tokens: int = 8) -> list[Request]:
    """Requests "0", "1", ... whose prompts have nothing in common."""
    return [
        create_request(str(i), [100 * i + t for t in range(prompt_tokens)], max_tokens)
        for i in range(count)
    ]


@dataclass
class StandInSpeculator:
    """Has a guess for every running request.

    Attributes:
        guess: Of a request's id and tokens so far, what follows; nothing for no guess.
        guesses: What the scheduler reads.
    """

    guess: Callable[[str, list[int]], list[int]]
    guesses: dict[str, list[int]] = field(default_factory=dict)

    def extended(self, request_id: str, token_ids: list[int]) -> None:
        self.guesses.pop(request_id, None)
        guess = self.guess(request_id, token_ids)
        if guess:
            self.guesses[request_id] = guess

    def forget(self, request_id: str) -> None:
        self.guesses.pop(request_id, None)


@dataclass
class Loop:
    """A scheduler and a runner, stepped by hand; remembers what came out of them.

    Attributes:
        scheduler: Gets a clock that goes on by a second in every step.
        runner: Executes its steps.
        kv: The scheduler's KV cache.
        runs_ahead: Schedule a step before the last one came back, where the scheduler lets it.
        now_s: The clock.
        tokens: By request id, what it was given so far.
        prompt_logprobs: By request id, of those that asked.
        ended: By request id, its last output.
        under_way: Steps that were scheduled and are not executed yet, oldest first: between two
            calls one if the loop runs ahead, else none.
    """

    scheduler: Scheduler
    runner: FakeRunner
    kv: KVCacheManager
    runs_ahead: bool = False
    now_s: float = 0.0
    tokens: dict[str, list[int]] = field(default_factory=dict)
    prompt_logprobs: dict[str, Sequence[TokenLogprobs]] = field(default_factory=dict)
    ended: dict[str, Output] = field(default_factory=dict)
    under_way: list[SchedulerOutput] = field(default_factory=list)

    def add(self, *requests: Request, constraint: TokenConstraint | None = None) -> None:
        """``constraint``: of all of them, and with a method ``mask``."""
        for request in requests:
            self.scheduler.add_request(request, self.now_s, constraint)
            self.tokens[request.request_id] = []
            self.prompt_logprobs.pop(request.request_id, None)

    def abort(self, request_id: str) -> Output | None:
        output = self.scheduler.abort_request(request_id)
        if output is not None:
            assert output.finish_reason is FinishReason.ABORT
            self.take([output])
        return output

    def expire(self) -> list[Output]:
        outputs = self.scheduler.expire(self.now_s)
        assert all(output.finish_reason is FinishReason.TIMEOUT for output in outputs)
        self.take(outputs)
        return outputs

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert output.request_id not in self.ended, "an output after the last one"
            if output.prompt_logprobs is not None:
                assert not self.tokens[output.request_id], "prompt_logprobs after the first output"
                self.prompt_logprobs[output.request_id] = output.prompt_logprobs
            assert output.logprobs is None or len(output.logprobs) == len(output.token_ids)
            self.tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.ended[output.request_id] = output

    def step(self, mid_step: Callable[[], object] = lambda: None) -> SchedulerOutput:
        """Schedule a step, execute the oldest one under way, and return the scheduled one.

        ``mid_step`` is called while the scheduled step is under way.
        """
        if self.under_way and not self.scheduler.may_run_ahead:
            self._execute()
        self.now_s += 1.0
        step = self.scheduler.schedule(self.now_s)
        self.under_way.append(step)
        self.scheduler.check_integrity()
        mid_step()
        self.scheduler.check_integrity()
        while len(self.under_way) > self.runs_ahead:
            self._execute()
        return step

    def run(self, max_steps: int = 1000) -> list[SchedulerOutput]:
        """Step until every request has ended."""
        steps = []
        while self.scheduler.has_unfinished_requests():
            waits = bool(self.under_way)
            steps.append(self.step())
            assert steps[-1].num_requests or waits, "there are requests, and nothing runs"
            assert len(steps) <= max_steps, "a request is starved"
        while self.under_way:
            self._execute()
        return steps

    def _execute(self) -> None:
        step = self.under_way.pop(0)
        masks = {
            request_id: constraint.mask()  # type: ignore[attr-defined]
            for request_id, constraint in self.scheduler.constraints(step).items()
        }
        output = self.runner.finish(self.runner.launch(step), masks)
        self.take(self.scheduler.update_from_output(step, output))
        self.scheduler.check_integrity()


def create_loop(
    *,
    num_blocks: int | tuple[int, ...] = 64,
    windows: tuple[int | None, ...] | None = None,
    tokens_per_block: int = 4,
    max_batch_size: int | None = None,
    max_num_tokens: int = 64,
    max_seq_len: int = 256,
    policy: CapacitySchedulerPolicy = "guaranteed_no_evict",
    enable_block_reuse: bool = True,
    enable_partial_reuse: bool = True,
    enable_chunked_prefill: bool = True,
    chunk_unit_tokens: int | None = None,
    max_queue_size: int = 64,
    speculator: Speculator | StandInSpeculator | None = None,
    runs_ahead: bool = False,
    vocab_size: int = 256,
    errors: dict[str, str] | None = None,
) -> Loop:
    """``num_blocks`` are those of each KV group; ``windows`` theirs, full attention by default."""
    pools = (num_blocks,) if isinstance(num_blocks, int) else num_blocks
    if max_batch_size is None:
        max_batch_size = min(8, max_num_tokens)
    runner = FakeRunner(
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        tokens_per_block=tokens_per_block,
        windows=windows or (None,) * len(pools),
        vocab_size=vocab_size,
        errors=errors,
    )
    runner.allocate_kv_cache(pools)
    kv = KVCacheManager(
        runner.info.kv_groups,
        pools,
        tokens_per_block,
        max_step_tokens=max_num_tokens,
        enable_block_reuse=enable_block_reuse,
        enable_partial_reuse=enable_partial_reuse,
    )
    scheduler = Scheduler(
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        kv=kv,
        policy=policy,
        enable_chunked_prefill=enable_chunked_prefill,
        max_queue_size=max_queue_size,
        chunk_unit_tokens=chunk_unit_tokens,
        speculator=speculator,  # type: ignore[arg-type]
    )
    return Loop(scheduler, runner, kv, runs_ahead)


def create_scheduler(**settings: object) -> Scheduler:
    """A scheduler alone, for tests that write the runner's answers themselves."""
    return create_loop(**settings).scheduler  # type: ignore[arg-type]


def scheduled_tokens(step: SchedulerOutput) -> dict[str, int]:
    """How many tokens each request of a step computes, in the order of the step."""
    guesses = step.draft_token_ids
    decodes = {request_id: 1 + len(guesses.get(request_id, ())) for request_id in step.decodes}
    return decodes | {prefill.request_id: prefill.num_tokens for prefill in step.prefills}
