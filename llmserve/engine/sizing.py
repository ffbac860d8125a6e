"""What an engine may do, worked out once: EngineConfig + the engine's BuildConfig -> EngineLimits,
and memory -> blocks of the KV pool.

Pure functions of numbers; they know no runner, no scheduler and no process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmserve.config import BuildConfig, EngineConfig, KvCacheConfig
from llmserve.core.step import KVGroupSpec
from llmserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """The limits an engine runs under, with nothing left to resolve.

    Attributes:
        max_batch_size: Most requests in one step.
        max_num_tokens: Most tokens computed in one step.
        max_seq_len: Longest prompt plus answer, in tokens.
        tokens_per_block: Tokens of one KV block.
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    tokens_per_block: int


def resolve_limits(config: EngineConfig, build: BuildConfig) -> EngineLimits:
    """Lower the engine's limits to what the server asks for.

    A batch never has more requests than a step has tokens: max_batch_size follows max_num_tokens
    down where only the latter is asked for.

    Args:
        config: What the engine is started with; None means as built.
        build: What the engine was built for, max_seq_len resolved.

    Raises:
        ConfigError: A limit is above the engine's.
    """
    if build.max_seq_len is None:
        raise ConfigError("max_seq_len of the engine's build_config is not set; build it again")
    max_num_tokens = _lowered("max_num_tokens", config.max_num_tokens, build.max_num_tokens)
    max_batch_size = _lowered("max_batch_size", config.max_batch_size, build.max_batch_size)
    if config.max_batch_size is not None and config.max_batch_size > max_num_tokens:
        raise ConfigError(
            f"max_batch_size is {config.max_batch_size}; it must be at most max_num_tokens "
            f"({max_num_tokens}), for every request of a step has at least one token in it"
        )
    return EngineLimits(
        max_batch_size=min(max_batch_size, max_num_tokens),
        max_num_tokens=max_num_tokens,
        max_seq_len=_lowered("max_seq_len", config.max_seq_len, build.max_seq_len),
        # Blocks are laid out when the pool is allocated, so this one is free in both directions.
        tokens_per_block=config.kv_cache.tokens_per_block or build.tokens_per_block,
    )


def _lowered(name: str, asked: int | None, built: int) -> int:
    if asked is None:
        return built
    if asked > built:
        raise ConfigError(
            f"{name} is {asked}; the engine was built for at most {built} "
            f"(build it again with --{name.replace('_', '-')} {asked})"
        )
    return asked


def kv_pool_bytes(
    config: KvCacheConfig, *, device: str, available_bytes: int, free_host_bytes: int
) -> int:
    """Bytes the KV pool may take.

    On CPU ``max_total_bytes``, and by default what the runner says; on CUDA the configured fraction
    of what is free there, and ``max_total_bytes`` if that is smaller.

    Args:
        config: The cache's settings.
        device: 'cpu' or 'cuda:0'.
        available_bytes: Of ``ModelRunner.available_kv_bytes``: the default on CPU, what is free on
            CUDA.
        free_host_bytes: The host's memory that nothing holds and no step will.

    Raises:
        ConfigError: ``max_total_bytes`` is more than the host has.
    """
    asked = config.max_total_bytes
    if device != "cpu":
        granted = int(available_bytes * config.free_gpu_memory_fraction)
        return granted if asked is None else min(asked, granted)
    if asked is not None and asked > free_host_bytes:
        raise ConfigError(
            f"max_total_bytes of the KV cache (--kv-cache-memory) is {_size(asked)}; only "
            f"{_size(free_host_bytes)} of memory are free"
        )
    return available_bytes if asked is None else asked


def num_kv_blocks(
    groups: Sequence[KVGroupSpec], limits: EngineLimits, config: KvCacheConfig, pool_bytes: int
) -> int:
    """Blocks of the pool, the same number in every KV group.

    The smallest of what ``pool_bytes`` holds, ``max_tokens``, and without block reuse what
    ``max_batch_size`` requests of ``max_seq_len`` tokens fill: more could hold nothing but
    prefixes of ended requests.

    Args:
        groups: The model's KV groups, with bytes per block.
        limits: The engine's resolved limits.
        config: For ``max_tokens`` and ``enable_block_reuse``.
        pool_bytes: Of ``kv_pool_bytes``.

    Raises:
        ConfigError: Not even one request of max_seq_len tokens would fit.
    """
    block_bytes = sum(group.bytes_per_block for group in groups)
    size = limits.tokens_per_block
    blocks_per_request = -(-limits.max_seq_len // size)
    by_bytes = pool_bytes // block_bytes
    by_tokens = by_bytes if config.max_tokens is None else config.max_tokens // size
    blocks = min(by_bytes, by_tokens)
    if blocks >= blocks_per_request:
        most = limits.max_batch_size * blocks_per_request
        return blocks if config.enable_block_reuse else min(blocks, most)
    if by_tokens < by_bytes:
        cause, remedy = (
            f"max_tokens of {config.max_tokens}",
            f"raise max_tokens to at least {blocks_per_request * size}",
        )
    else:
        cause, remedy = (
            f"{_size(pool_bytes)} of memory",
            "raise max_total_bytes (--kv-cache-memory) to at least "
            f"{_size(blocks_per_request * block_bytes)}",
        )
    lower = f"lower max_seq_len to at most {blocks * size} or " if blocks else ""
    raise ConfigError(
        f"a KV cache with {cause} has {blocks} blocks of {size} tokens, but one request of "
        f"max_seq_len {limits.max_seq_len} needs {blocks_per_request}; {lower}{remedy}"
    )


def _size(num_bytes: int) -> str:
    """Bytes as a person writes them; what ``parse_bytes`` reads back is never smaller."""
    if num_bytes >= 2**20:
        return f"{-(-num_bytes // 2**20)}MiB"
    return f"{num_bytes}B"
