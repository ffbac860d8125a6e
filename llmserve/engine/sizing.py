"""What an engine may do, worked out once: EngineConfig + the engine's BuildConfig -> EngineLimits,
and memory -> blocks of the KV pool.

Pure functions of numbers; they know no runner, no scheduler and no process.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from llmserve.config import BuildConfig, EngineConfig, KvCacheConfig
from llmserve.core.kv_cache_manager import max_sequence_blocks
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

    On CPU ``max_total_bytes``, and by default what the runner says; on CUDA
    ``free_gpu_memory_fraction`` of what is free there. ``memory_fraction`` takes the place of these
    defaults on either, and where ``max_total_bytes`` is smaller, that counts.

    Args:
        config: The cache's settings.
        device: 'cpu' or 'cuda:0'.
        available_bytes: Of ``ModelRunner.available_kv_bytes``: the default on CPU, what is free on
            CUDA.
        free_host_bytes: The host's memory that nothing holds and no step will.

    Raises:
        ConfigError: ``max_total_bytes`` is more than the host has.
    """
    asked, share = config.max_total_bytes, config.memory_fraction
    if device != "cpu":
        granted = int(available_bytes * (share or config.free_gpu_memory_fraction))
        return granted if asked is None else min(asked, granted)
    if asked is not None and asked > free_host_bytes:
        raise ConfigError(
            f"max_total_bytes of the KV cache (--kv-cache-memory) is {_size(asked)}; only "
            f"{_size(free_host_bytes)} of memory are free"
        )
    if share is not None:
        granted = int(free_host_bytes * share)
        return granted if asked is None else min(asked, granted)
    return available_bytes if asked is None else asked


def request_blocks(groups: Sequence[KVGroupSpec], limits: EngineLimits) -> tuple[int, ...]:
    """Most blocks of each KV group that one request of max_seq_len tokens holds."""
    return tuple(
        max_sequence_blocks(
            limits.max_seq_len,
            group.window,
            max_step_tokens=limits.max_num_tokens,
            tokens_per_block=limits.tokens_per_block,
        )
        for group in groups
    )


def kv_bytes(groups: Sequence[KVGroupSpec], num_blocks: Sequence[int]) -> int:
    """Bytes of so many blocks of each KV group."""
    return sum(g.bytes_per_block * count for g, count in zip(groups, num_blocks, strict=True))


def num_kv_blocks(
    groups: Sequence[KVGroupSpec], limits: EngineLimits, config: KvCacheConfig, pool_bytes: int
) -> tuple[int, ...]:
    """Blocks of each KV group's pool, so that the same number of full requests fits every group.

    A full request has max_seq_len tokens; a group with a sliding window holds fewer of them, and
    gets so many fewer blocks. There is room for the smallest number of what ``pool_bytes`` holds,
    ``max_tokens``, and without block reuse ``max_batch_size``: more could hold nothing but prefixes
    of ended requests.

    Args:
        groups: The model's KV groups, with bytes per block.
        limits: The engine's resolved limits.
        config: For ``max_tokens`` and ``enable_block_reuse``.
        pool_bytes: Of ``kv_pool_bytes``.

    Raises:
        ConfigError: Not even one request of max_seq_len tokens would fit.
    """
    size = limits.tokens_per_block
    per_request = request_blocks(groups, limits)
    request_bytes = kv_bytes(groups, per_request)
    # Full requests, as fractions: a group's last blocks may hold a part of one.
    by_bytes = Fraction(pool_bytes, request_bytes)
    by_tokens = (
        by_bytes
        if config.max_tokens is None
        else Fraction(config.max_tokens // size, -(-limits.max_seq_len // size))
    )
    requests = min(by_bytes, by_tokens)
    if requests >= 1:
        if not config.enable_block_reuse:
            requests = min(requests, Fraction(limits.max_batch_size))
        return tuple(int(requests * blocks) for blocks in per_request)
    fitting = _longest_request(groups, limits, requests * request_bytes)
    if by_tokens < by_bytes:
        cause = f"max_tokens of {config.max_tokens}"
        remedy = f"raise max_tokens to at least {-(-limits.max_seq_len // size) * size}"
    else:
        cause = f"{_size(pool_bytes)} of memory"
        remedy = f"raise max_total_bytes (--kv-cache-memory) to at least {_size(request_bytes)}"
    lower = f"lower max_seq_len to at most {fitting} or " if fitting else ""
    raise ConfigError(
        f"a KV cache with {cause} has room for {fitting} tokens of a request, in blocks of {size}, "
        f"but max_seq_len is {limits.max_seq_len}; {lower}{remedy}"
    )


def _longest_request(
    groups: Sequence[KVGroupSpec], limits: EngineLimits, pool_bytes: Fraction
) -> int:
    """Tokens of the longest request that fits, in whole blocks."""
    size = limits.tokens_per_block

    def takes(num_blocks: int) -> int:
        shorter = dataclasses.replace(limits, max_seq_len=num_blocks * size)
        return kv_bytes(groups, request_blocks(groups, shorter))

    lengths = range(1, limits.max_seq_len // size + 1)
    return bisect_right(lengths, int(pool_bytes), key=takes) * size


def _size(num_bytes: int) -> str:
    """Bytes as a person writes them; what ``parse_bytes`` reads back is never smaller."""
    if num_bytes >= 2**20:
        return f"{-(-num_bytes // 2**20)}MiB"
    return f"{num_bytes}B"
