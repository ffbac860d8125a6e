from __future__ import annotations

import dataclasses
import re

import pytest

from llmserve.config import BuildConfig, EngineConfig, KvCacheConfig
from llmserve.core.step import KVGroupSpec
from llmserve.engine.sizing import (
    EngineLimits,
    kv_bytes,
    kv_pool_bytes,
    num_kv_blocks,
    request_blocks,
    resolve_limits,
)
from llmserve.errors import ConfigError

BUILD = BuildConfig(max_batch_size=8, max_num_tokens=128, max_seq_len=64, tokens_per_block=16)
LIMITS = EngineLimits(max_batch_size=8, max_num_tokens=128, max_seq_len=64, tokens_per_block=16)
GROUPS = (KVGroupSpec(layers=(0, 1), window=None, bytes_per_block=2**20),)
GIB = 2**30


def test_what_is_not_given_is_as_built() -> None:
    assert resolve_limits(EngineConfig(), BUILD) == LIMITS


@pytest.mark.parametrize("name", ["max_batch_size", "max_num_tokens", "max_seq_len"])
def test_limits_are_lowered_and_never_raised(name: str) -> None:
    built = getattr(BUILD, name)
    assert getattr(resolve_limits(EngineConfig(**{name: built - 1}), BUILD), name) == built - 1
    with pytest.raises(ConfigError, match=f"{name} is {built + 1}; .* at most {built} "):
        resolve_limits(EngineConfig(**{name: built + 1}), BUILD)


def test_tokens_per_block_may_be_anything() -> None:
    for size in (1, 16, 64):
        config = EngineConfig(kv_cache=KvCacheConfig(tokens_per_block=size))
        assert resolve_limits(config, BUILD).tokens_per_block == size


def test_a_batch_is_no_larger_than_a_step() -> None:
    assert resolve_limits(EngineConfig(max_num_tokens=4), BUILD).max_batch_size == 4
    with pytest.raises(ConfigError, match=r"max_batch_size is 5; .* max_num_tokens \(4\)"):
        resolve_limits(EngineConfig(max_num_tokens=4, max_batch_size=5), BUILD)


def test_pool_on_cpu() -> None:
    def pool(**settings: int) -> int:
        config = KvCacheConfig(**settings)  # type: ignore[arg-type]
        return kv_pool_bytes(config, device="cpu", available_bytes=3 * GIB, free_host_bytes=6 * GIB)

    assert pool() == 3 * GIB
    # An explicit size may be more than the default, but not more than there is.
    assert pool(max_total_bytes=GIB) == GIB
    assert pool(max_total_bytes=5 * GIB) == 5 * GIB
    with pytest.raises(ConfigError, match=r"max_total_bytes .* is 7168MiB; only 6144MiB"):
        pool(max_total_bytes=7 * GIB)


def test_pool_on_cuda() -> None:
    def pool(**settings: float) -> int:
        config = KvCacheConfig(**settings)  # type: ignore[arg-type]
        return kv_pool_bytes(
            config, device="cuda:0", available_bytes=100 * GIB, free_host_bytes=GIB
        )

    assert pool() == 90 * GIB
    assert pool(free_gpu_memory_fraction=0.5) == 50 * GIB
    assert pool(max_total_bytes=8 * GIB) == 8 * GIB
    assert pool(max_total_bytes=95 * GIB) == 90 * GIB


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_pool_as_a_share_of_what_is_free(device: str) -> None:
    def pool(**settings: float) -> int:
        config = KvCacheConfig(**settings)  # type: ignore[arg-type]
        free = 6 * GIB  # on a CPU that is the host's memory, and what the runner says a default
        available = GIB if device == "cpu" else free
        return kv_pool_bytes(config, device=device, available_bytes=available, free_host_bytes=free)

    assert pool(memory_fraction=0.5) == 3 * GIB
    assert pool(memory_fraction=1.0) == 6 * GIB
    assert pool(memory_fraction=0.5, max_total_bytes=2 * GIB) == 2 * GIB
    assert pool(memory_fraction=0.5, max_total_bytes=4 * GIB) == 3 * GIB


def test_blocks_are_the_smallest_of_three_caps() -> None:
    def blocks(pool_mib: int, max_tokens: int | None = None) -> tuple[int, ...]:
        return num_kv_blocks(GROUPS, LIMITS, KvCacheConfig(max_tokens=max_tokens), pool_mib * 2**20)

    assert blocks(10) == (10,)
    assert blocks(10, max_tokens=7 * 16 + 15) == (7,)
    assert blocks(10, max_tokens=10_000) == (10,)
    assert blocks(10_000) == (10_000,)
    # Eight requests of 64 tokens fill no more, and without reuse nothing else may stay.
    no_reuse = KvCacheConfig(enable_block_reuse=False)
    assert num_kv_blocks(GROUPS, LIMITS, no_reuse, 10_000 * 2**20) == (8 * 4,)


def test_the_pool_is_shared_by_all_groups() -> None:
    assert num_kv_blocks(GROUPS * 2, LIMITS, KvCacheConfig(), 10 * 2**20) == (5, 5)


def test_the_same_number_of_requests_fits_every_group() -> None:
    # A request of 1024 tokens: 64 blocks of 16, or at most (100 - 1 + 28) tokens anywhere: 9.
    limits = EngineLimits(
        max_batch_size=8, max_num_tokens=28, max_seq_len=1024, tokens_per_block=16
    )
    groups = (
        KVGroupSpec(layers=(0, 2), window=100, bytes_per_block=2000),
        KVGroupSpec(layers=(1,), window=None, bytes_per_block=1000),
    )
    assert request_blocks(groups, limits) == (9, 64)
    request_bytes = 9 * 2000 + 64 * 1000
    for requests in (1, 3, 20):
        made = num_kv_blocks(groups, limits, KvCacheConfig(), requests * request_bytes)
        assert made == (requests * 9, requests * 64)
        assert sum(n * g.bytes_per_block for n, g in zip(made, groups, strict=True)) == (
            requests * request_bytes
        )
    for pool_bytes in range(request_bytes, 3 * request_bytes, 4321):
        made = num_kv_blocks(groups, limits, KvCacheConfig(), pool_bytes)
        assert kv_bytes(groups, made) <= pool_bytes
        assert made[0] // 9 == made[1] // 64 == pool_bytes // request_bytes
    # max_tokens are tokens of requests: half a request's, and its blocks behind the window too.
    capped = num_kv_blocks(groups, limits, KvCacheConfig(max_tokens=1536), 10**9)
    assert capped == (13, 96)
    no_reuse = KvCacheConfig(enable_block_reuse=False)
    assert num_kv_blocks(groups, limits, no_reuse, 10**9) == (8 * 9, 8 * 64)


def test_a_pool_too_small_for_one_request_says_what_helps() -> None:
    with pytest.raises(ConfigError) as raised:
        num_kv_blocks(GROUPS, LIMITS, KvCacheConfig(), 3 * 2**20)
    for part in ("3MiB", "room for 48 tokens", "max_seq_len is 64", "at most 48", "least 4MiB"):
        assert part in str(raised.value)
    with pytest.raises(ConfigError, match="raise max_tokens to at least 64"):
        num_kv_blocks(GROUPS, LIMITS, KvCacheConfig(max_tokens=63), 10 * 2**20)
    # The advice holds.
    assert num_kv_blocks(GROUPS, LIMITS, KvCacheConfig(max_tokens=64), 4 * 2**20) == (4,)


@pytest.mark.parametrize("pool_bytes", [3_000, 20_000, 60_000, 81_999])
def test_the_advice_holds_with_a_window_too(pool_bytes: int) -> None:
    limits = EngineLimits(
        max_batch_size=8, max_num_tokens=28, max_seq_len=1024, tokens_per_block=16
    )
    groups = (
        KVGroupSpec(layers=(0, 2), window=100, bytes_per_block=2000),
        KVGroupSpec(layers=(1,), window=None, bytes_per_block=1000),
    )
    with pytest.raises(ConfigError, match=r"at least 82000B") as raised:
        num_kv_blocks(groups, limits, KvCacheConfig(), pool_bytes)
    found = re.search(r"lower max_seq_len to at most (\d+)", str(raised.value))
    assert found is not None
    length = int(found[1])
    assert length % 16 == 0
    for seq_len, fits in ((length, True), (length + 1, False)):
        shorter = dataclasses.replace(limits, max_seq_len=seq_len)
        needed = kv_bytes(groups, request_blocks(groups, shorter))
        assert (needed <= pool_bytes) is fits
    assert num_kv_blocks(
        groups, dataclasses.replace(limits, max_seq_len=length), KvCacheConfig(), pool_bytes
    )
