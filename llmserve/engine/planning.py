"""Whether a model fits a memory, and what it can serve there: arithmetic alone, no GPU and no load.

The numbers are those that the engine sizes itself by (``runtime/memory.py``, ``engine/sizing.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from llmserve.checkpoint.config import ParallelMapping, PretrainedConfig
from llmserve.checkpoint.quant_config import FP8_ROWWISE_EXCLUDE_MODULES, QuantConfig
from llmserve.checkpoint.sharding import check_tp_size
from llmserve.core.step import KVGroupSpec
from llmserve.engine.sizing import EngineLimits, kv_bytes, request_blocks
from llmserve.errors import CheckpointError
from llmserve.runtime.memory import (
    PROCESS_BYTES,
    activation_bytes,
    kv_groups,
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
        kv_groups: The layers by the window that they see.
        limits: What was planned for.
    """

    memory_bytes: int
    process_bytes: int
    weights_bytes: int
    activation_bytes: int
    kv_groups: tuple[KVGroupSpec, ...]
    limits: EngineLimits

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token in all layers."""
        block_bytes = sum(group.bytes_per_block for group in self.kv_groups)
        return block_bytes // self.limits.tokens_per_block

    @property
    def kv_pool_bytes(self) -> int:
        """What is left for K and V, in whole blocks; 0 if there is nothing."""
        return kv_bytes(self.kv_groups, self.kv_blocks)

    @property
    def kv_blocks(self) -> tuple[int, ...]:
        """Blocks of each KV group that fit."""
        pool_bytes = max(0, self.memory_bytes - self._fixed_bytes)
        requests = Fraction(pool_bytes, self._request_bytes)
        return tuple(int(requests * blocks) for blocks in self._request_blocks)

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit, of requests of max_seq_len tokens."""
        size = self.limits.tokens_per_block
        blocks = -(-self.limits.max_seq_len // size)
        return sum(self.kv_blocks) * blocks // sum(self._request_blocks) * size

    @property
    def full_requests(self) -> int:
        """Requests of max_seq_len tokens that fit at once."""
        fitting = sum(self.kv_blocks) // sum(self._request_blocks)
        return min(fitting, self.limits.max_batch_size)

    @property
    def fits(self) -> bool:
        """Whether at least one request of max_seq_len tokens can be served."""
        return self.full_requests >= 1

    @property
    def missing_bytes(self) -> int:
        """How much more memory one request of max_seq_len tokens needs; 0 if it fits."""
        return max(0, self._fixed_bytes + self._request_bytes - self.memory_bytes)

    @property
    def _fixed_bytes(self) -> int:
        return self.process_bytes + self.weights_bytes + self.activation_bytes

    @property
    def _request_blocks(self) -> tuple[int, ...]:
        return request_blocks(self.kv_groups, self.limits)

    @property
    def _request_bytes(self) -> int:
        return kv_bytes(self.kv_groups, self._request_blocks)


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
        kv_groups=kv_groups(config, limits.tokens_per_block, limits.max_seq_len),
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

    def fits(change: _Change) -> bool:
        try:
            check_tp_size(change.config, change.config.tp_size)
        except CheckpointError:
            return False
        return plan_memory(change.config, change.limits, plan.memory_bytes).fits

    kinds = _changes(config, plan.limits, can_quantize, can_split)
    first = (next(filter(fits, kind), None) for kind in kinds)
    return [change.advice for change in first if change is not None]


class _Change(NamedTuple):
    """What is planned for instead, and how to ask for it."""

    advice: str
    config: PretrainedConfig
    limits: EngineLimits


def _changes(
    config: PretrainedConfig, limits: EngineLimits, can_quantize: bool, can_split: bool
) -> Iterator[Iterable[_Change]]:
    """Kinds of changes, each with the mildest first."""
    yield (
        _Change(
            f"--max-num-tokens {tokens} --max-batch-size {min(limits.max_batch_size, tokens)}",
            config,
            dataclasses.replace(
                limits,
                max_num_tokens=tokens,
                max_batch_size=min(limits.max_batch_size, tokens),
            ),
        )
        for tokens in _halves(limits.max_num_tokens, 256)
    )
    yield (
        _Change(f"--max-seq-len {length}", config, dataclasses.replace(limits, max_seq_len=length))
        for length in _halves(limits.max_seq_len, 512)
    )
    quantization = config.quantization
    if can_quantize and quantization.kv_cache_quant_algo is None:
        eight = dataclasses.replace(quantization, kv_cache_quant_algo="FP8")
        other = dataclasses.replace(config, quantization=eight)
        yield [_Change("--kv-cache-dtype fp8", other, limits)]
    if can_quantize and quantization.quant_algo is None:
        for name, algo in (
            ("w8a16", QuantConfig(quant_algo="W8A16")),
            ("fp8_rowwise", _FP8_ROWWISE),
        ):
            other = dataclasses.replace(config, quantization=algo)
            yield [_Change(f"--quant {name}", other, limits)]
    for tp_size in (2, 4, 8) if can_split else ():
        if tp_size > config.tp_size:
            mapping = ParallelMapping.tensor_parallel(tp_size)
            other = dataclasses.replace(config, mapping=mapping, use_parallel_embedding=True)
            yield [_Change(f"--tp {tp_size} (so much memory for each rank)", other, limits)]


_FP8_ROWWISE = QuantConfig(
    quant_algo="FP8_PER_CHANNEL_PER_TOKEN", exclude_modules=list(FP8_ROWWISE_EXCLUDE_MODULES)
)


def _halves(value: int, least: int) -> Iterator[int]:
    """Half of ``value``, a quarter, ... down to ``least``."""
    while (value := value // 2) >= least:
        yield value
