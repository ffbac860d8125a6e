"""A ModelRunner that only waits, as a CPU does beside a GPU: for measuring what is around a model.

Its tokens say how well it is kept busy. ``fake.py`` has a runner that checks every step, which
takes as long as a model.
"""

from __future__ import annotations

import time

from llmserve.core.step import KVGroupSpec, ModelRunnerOutput, SchedulerOutput
from llmserve.runtime.model_runner import ModelInfo, TokenMasks


class IdleRunner:
    """Implements ModelRunner. A token is the number of microseconds that went by since the end of
    the step before, less ``step_s``: what kept this step from ending as early as it could.

    Args:
        max_seq_len: The longest request, in tokens.
        vocab_size: Generated ids are in [0, vocab_size).
        step_s: Seconds that each step takes, from ``launch`` on.
    """

    def __init__(self, *, max_seq_len: int, vocab_size: int, step_s: float) -> None:
        self.info = ModelInfo(
            vocab_size=vocab_size,
            max_seq_len=max_seq_len,
            kv_groups=(KVGroupSpec(layers=(0,), window=None, bytes_per_block=1024),),
            weights_bytes=0,
            workspace_bytes=0,
            device="cpu",
            dtype="float32",
            quant_algo=None,
        )
        self._step_s = step_s
        self._num_tokens: dict[str, int] = {}  # when they came, by request id
        self._last_end_s = 0.0

    def available_kv_bytes(self) -> int:
        """Room for 65,536 blocks, which take nothing."""
        return 1024 * 2**16

    def allocate_kv_cache(self, num_blocks: tuple[int, ...]) -> None:
        """There is no cache."""

    def warm_up(self) -> None:
        """There is nothing to warm."""

    def launch(self, scheduler_output: SchedulerOutput) -> tuple[SchedulerOutput, float]:
        """Accept a step. The handle is the step, and when it ends."""
        return scheduler_output, time.monotonic() + self._step_s

    def finish(
        self, handle: tuple[SchedulerOutput, float], masks: TokenMasks | None = None
    ) -> ModelRunnerOutput:
        """Wait for the step's end."""
        step, end_s = handle
        for request_id in step.finished_request_ids:
            del self._num_tokens[request_id]
        for new in step.new_requests:
            self._num_tokens[new.request_id] = len(new.token_ids)
        sampling = list(step.decodes)
        for prefill in step.prefills:
            stop = prefill.num_computed_tokens + prefill.num_tokens
            if stop == self._num_tokens[prefill.request_id]:
                sampling.append(prefill.request_id)
        time.sleep(max(0.0, end_s - time.monotonic()))
        now_s = time.monotonic()
        late_us = round(1e6 * (now_s - self._last_end_s - self._step_s))
        self._last_end_s = now_s
        token_id = min(max(0, late_us), self.info.vocab_size - 1)
        return ModelRunnerOutput(token_ids={request_id: [token_id] for request_id in sampling})

    def shutdown(self) -> None:
        """There is nothing to free."""
