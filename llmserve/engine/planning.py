"""Whether a model fits a memory, and what it can serve there: arithmetic alone, no GPU and no load.

The numbers are those that the engine sizes itself by (``runtime/memory.py``, ``engine/sizing.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from llmserve.checkpoint.config import ParallelMapping, PretrainedConfig
from llmserve.checkpoint.quant_config import FP8_ROWWISE_EXCLUDE_MODULES, QuantConfig
from llmserve.checkpoint.sharding import check_tp_size
from llmserve.engine.sizing import EngineLimits
from llmserve.errors import CheckpointError
from llmserve.runtime.memory import (
    PROCESS_BYTES,
    activation_bytes,
    kv_bytes_per_token,
    weights_bytes,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What a model takes of a memory. Bytes are of one rank.

    Attributes:
        memory_bytes: What there is: of one GPU, or a host's share for one rank.
        process_bytes: An interpreter with torch.
        weights_bytes: All weights.
        activation_bytes: The most that a step holds.
        kv_bytes_per_token: K and V of one token.
        limits: What was planned for.
    """

    memory_bytes: int
    process_bytes: int
    weights_bytes: int
    activation_bytes: int
    kv_bytes_per_token: int
    limits: EngineLimits

    @property
    def kv_pool_bytes(self) -> int:
        """What is left for K and V, in whole blocks; 0 if there is nothing."""
        return self.kv_blocks * self._block_bytes

    @property
    def kv_blocks(self) -> int:
        """Blocks that fit."""
        used = self.process_bytes + self.weights_bytes + self.activation_bytes
        return max(0, self.memory_bytes - used) // self._block_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit, over all requests."""
        return self.kv_blocks * self.limits.tokens_per_block

    @property
    def full_requests(self) -> int:
        """Requests of max_seq_len tokens that fit at once."""
        per_request = -(-self.limits.max_seq_len // self.limits.tokens_per_block)
        return min(self.kv_blocks // per_request, self.limits.max_batch_size)

    @property
    def fits(self) -> bool:
        """Whether at least one request of max_seq_len tokens can be served."""
        return self.full_requests >= 1

    @property
    def missing_bytes(self) -> int:
        """How much more memory one request of max_seq_len tokens needs; 0 if it fits."""
        per_request = -(-self.limits.max_seq_len // self.limits.tokens_per_block)
        used = self.process_bytes + self.weights_bytes + self.activation_bytes
        return max(0, used + per_request * self._block_bytes - self.memory_bytes)

    @property
    def _block_bytes(self) -> int:
        return self.kv_bytes_per_token * self.limits.tokens_per_block


def plan_memory(config: PretrainedConfig, limits: EngineLimits, memory_bytes: int) -> MemoryPlan:
    """Work out what a model takes.

    Args:
        config: Of the checkpoint or engine.
        limits: That the engine would run under.
        memory_bytes: Of one GPU, or a host's share for one rank.
    """
    return MemoryPlan(
        memory_bytes=memory_bytes,
        process_bytes=PROCESS_BYTES,
        weights_bytes=weights_bytes(config),
        activation_bytes=activation_bytes(
            config,
            max_num_tokens=limits.max_num_tokens,
            max_batch_size=limits.max_batch_size,
            max_seq_len=limits.max_seq_len,
        ),
        kv_bytes_per_token=kv_bytes_per_token(config),
        limits=limits,
    )


def remedies(
    plan: MemoryPlan, config: PretrainedConfig, *, can_quantize: bool, can_split: bool
) -> list[str]:
    """What would make a model fit that does not, each alone, the mildest first; often nothing does.

    Args:
        plan: One that does not fit.
        config: What it was made for.
        can_quantize: Whether the formats of weights, and of K and V, can still be chosen.
        can_split: Whether the number of ranks can.
    """
    found = []
    for advice, other, limits in _changes(plan, config, can_quantize, can_split):
        try:
            check_tp_size(other, other.tp_size)
        except CheckpointError:
            continue
        if plan_memory(other, limits, plan.memory_bytes).fits:
            found.append(advice)
    return found


def _changes(
    plan: MemoryPlan, config: PretrainedConfig, can_quantize: bool, can_split: bool
) -> Iterator[tuple[str, PretrainedConfig, EngineLimits]]:
    limits = plan.limits
    for tokens in _halves(limits.max_num_tokens, 256):
        batch = min(limits.max_batch_size, tokens)
        lower = dataclasses.replace(limits, max_num_tokens=tokens, max_batch_size=batch)
        advice = f"--max-num-tokens {tokens} --max-batch-size {batch}"
        if plan_memory(config, lower, plan.memory_bytes).fits:
            yield advice, config, lower
            break
    for length in _halves(limits.max_seq_len, 512):
        shorter = dataclasses.replace(limits, max_seq_len=length)
        if plan_memory(config, shorter, plan.memory_bytes).fits:
            yield f"--max-seq-len {length}", config, shorter
            break
    quantization = config.quantization
    if can_quantize and quantization.kv_cache_quant_algo is None:
        eight = dataclasses.replace(quantization, kv_cache_quant_algo="FP8")
        yield "--kv-cache-dtype fp8", dataclasses.replace(config, quantization=eight), limits
    if can_quantize and quantization.quant_algo is None:
        for name, algo in (
            ("w8a16", QuantConfig(quant_algo="W8A16")),
            ("fp8_rowwise", _FP8_ROWWISE),
        ):
            yield f"--quant {name}", dataclasses.replace(config, quantization=algo), limits
    if can_split:
        for tp_size in (2, 4, 8):
            if tp_size > config.tp_size:
                mapping = ParallelMapping.tensor_parallel(tp_size)
                split = dataclasses.replace(config, mapping=mapping, use_parallel_embedding=True)
                yield f"--tp {tp_size} (so much memory for each rank)", split, limits


_FP8_ROWWISE = QuantConfig(
    quant_algo="FP8_PER_CHANNEL_PER_TOKEN", exclude_modules=list(FP8_ROWWISE_EXCLUDE_MODULES)
)


def _halves(value: int, least: int) -> Iterator[int]:
    """Half of ``value``, a quarter, ... down to ``least``."""
    while (value := value // 2) >= least:
        yield value
