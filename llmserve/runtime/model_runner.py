"""The seam between the scheduler and whatever computes a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from llmserve.core.step import KVGroupSpec, ModelRunnerOutput, SchedulerOutput


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
    """Computes steps. Two calls, so that a step is prepared while another runs."""

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
        """Start a step and return a handle for ``finish``. At most one step is under way."""
        ...

    def finish(self, handle: Any, masks: Any = None) -> ModelRunnerOutput:
        """Wait for a step, sample under ``masks`` (grammar bitmasks; None for now), return."""
        ...

    def shutdown(self) -> None:
        """Free what is held. No call after this one."""
        ...
