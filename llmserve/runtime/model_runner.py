"""The seam between the scheduler and whatever computes a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from llmserve.core.step import KVGroupSpec, ModelRunnerOutput, SchedulerOutput

TokenMasks: TypeAlias = Mapping[str, npt.NDArray[np.int32]]
"""Which tokens may be drawn, for some of the requests that sample in a step, by request id.

int32 (ceil(vocab_size / 32),): bit i % 32 of word i // 32 says whether token i may be.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a runner says of its model, before any KV cache is there.

    Of several ranks bytes are those of all of them on a CPU, and those of each GPU on CUDA.

    Attributes:
        vocab_size: Tokens the logits have, padding left out: valid ids are [0, vocab_size).
        max_seq_len: The engine's limit in tokens.
        kv_groups: One for most models; sliding and full layers make two.
        weights_bytes: Resident weights.
        workspace_bytes: The most that a step takes beside them and the KV cache.
        device: 'cpu' or 'cuda:0'.
        dtype: Of activations and the KV cache.
        quant_algo: As in config.json, or None.
    """

    vocab_size: int
    max_seq_len: int
    kv_groups: tuple[KVGroupSpec, ...]
    weights_bytes: int
    workspace_bytes: int
    device: str
    dtype: str
    quant_algo: str | None


class ModelRunner(Protocol):
    """Computes steps, each with two calls: what a step may draw is known only when the step before
    has ended, and is worked out while this one computes. ``engine/step_thread.py`` calls both.
    """

    info: ModelInfo

    def available_kv_bytes(self) -> int:
        """Memory there is for a KV cache after loading, in bytes.

        On CPU what it takes by default; on CUDA what is free, of which the engine takes its
        ``free_gpu_memory_fraction``.
        """
        ...

    def allocate_kv_cache(self, num_blocks: tuple[int, ...]) -> None:
        """Make room for this many blocks per KV group. Called once, before the first launch."""
        ...

    def warm_up(self) -> None:
        """Run one small step so that the first request pays for nothing. Leaves no trace."""
        ...

    def launch(self, scheduler_output: SchedulerOutput) -> Any:
        """Start a step and return a handle for ``finish``. The step before has been finished."""
        ...

    def finish(self, handle: Any, masks: TokenMasks | None = None) -> ModelRunnerOutput:
        """Sample the step's tokens under ``masks``, wait for them and return them."""
        ...

    def shutdown(self) -> None:
        """Free what is held. No call after this one."""
        ...
