"""What is served, by which release, under which limits, and how a start fails."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from llmserve.build.tensorrt_llm import build
from llmserve.config import EngineConfig, KvCacheConfig, NGramDecodingConfig
from llmserve.engine.engine import Health
from llmserve.engine.tensorrt_llm import TensorRTLLMEngine, adapter
from llmserve.errors import (
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    EngineError,
    EngineShutdownError,
    LlmserveError,
    UnsupportedCheckpointError,
)
from llmserve.runtime.tensorrt_llm_release import installed_release
from tests import standins
from tests.engine.factories import until
from tests.engine.tensorrt_llm.factories import (
    LIMITS,
    VOCAB_SIZE,
    Start,
    answer,
    greedy,
    make_request,
)


async def test_what_it_is(start: Start, kind: str, models: dict[str, Path]) -> None:
    engine = await start()
    info = engine.info
    assert (info.backend, info.device, info.pid) == ("tensorrt-llm", "cuda:0", os.getpid())
    assert (info.dtype, info.quant_algo, info.vocab_size) == ("bfloat16", "FP8", VOCAB_SIZE)
    assert info.max_seq_len == 128
    assert info.max_batch_size == (8 if kind == "engine" else 2048)
    assert info.max_num_tokens == (64 if kind == "engine" else 8192)
    # The stand-in's statistics say 64 blocks.
    assert (info.tokens_per_block, info.num_kv_blocks) == (16 if kind == "engine" else 32, 64)
    # K and V, 2 layers, 2 heads of 16; FP8 in the engine's cache alone.
    token_bytes = 2 * 2 * 2 * 16 * (1 if kind == "engine" else 2)
    assert info.kv_cache_bytes == 64 * info.tokens_per_block * token_bytes
    pattern = "rank0.engine" if kind == "engine" else "model.safetensors"
    assert info.weights_bytes == (models[kind] / pattern).stat().st_size
    assert await engine.health() == Health(True)
    with pytest.raises(RuntimeError, match="once"):
        await engine.start()


async def test_shutdown_while_loading(
    start: Start, kind: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    await start()
    loaded, release = threading.Event(), threading.Event()
    real = adapter.load

    def slow(*args: Any, **kwargs: Any) -> Any:
        loaded.set()
        release.wait()
        return real(*args, **kwargs)

    monkeypatch.setattr(adapter, "load", slow)
    engine = TensorRTLLMEngine(models[kind])
    starting = asyncio.create_task(engine.start())
    await asyncio.to_thread(loaded.wait)
    assert await engine.health() == Health(False, "the engine is loading")
    await engine.shutdown()
    with pytest.raises(EngineShutdownError, match="while it was loading"):
        await starting
    release.set()
    llms = standins.behaviour().llms

    async def is_shut_down() -> bool:
        return len(llms) == 2 and llms[1]._executor is None

    await until(is_shut_down)  # what came of it has nobody who would


async def test_a_model_that_does_not_load(start: Start, kind: str, models: dict[str, Path]) -> None:
    await start()
    standins.behaviour().load_error = RuntimeError("CUDA out of memory")
    engine = TensorRTLLMEngine(models[kind])
    with pytest.raises(EngineError, match=r"TensorRT-LLM 1\.\d.* could not load .*out of memory"):
        await engine.start()
    assert "out of memory" in (await engine.health()).reason
    with pytest.raises(EngineDeadError, match="out of memory"):
        _ = engine.info


async def test_a_model_that_gives_no_first_answer(
    start: Start, kind: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "_SHUTDOWN_TIMEOUT_S", 0.1)
    await start()
    standins.behaviour().running.clear()
    engine = TensorRTLLMEngine(models[kind], EngineConfig(stall_timeout_s=0.2))
    with pytest.raises(EngineError, match=r"gave no answer for 0\.2 s"):
        await engine.start()


async def test_settings_reach_the_llm(start: Start, kind: str) -> None:
    cache = KvCacheConfig(
        enable_block_reuse=False,
        enable_partial_reuse=False,
        max_tokens=512,
        max_total_bytes=2**20,
        free_gpu_memory_fraction=0.5,
        tokens_per_block=16,
    )
    config = EngineConfig(
        max_batch_size=4,
        max_num_tokens=32,
        max_seq_len=100,
        kv_cache=cache,
        capacity_scheduler_policy="max_utilization",
    )
    engine = await start(config=config)
    from tensorrt_llm.llmapi import CapacitySchedulerPolicy  # type: ignore[import-not-found]

    (llm,) = standins.behaviour().llms
    policy = llm.kwargs["scheduler_config"].capacity_scheduler_policy
    assert policy is CapacitySchedulerPolicy.MAX_UTILIZATION
    told = llm.kwargs["kv_cache_config"]
    assert (told.enable_block_reuse, told.enable_partial_reuse) == (False, False)
    assert told.free_gpu_memory_fraction == 0.5
    assert (told.max_tokens, told.max_gpu_total_bytes) == (512, 2**20)
    names = ("max_batch_size", "max_num_tokens", "max_seq_len", "enable_chunked_prefill")
    assert [llm.kwargs[name] for name in names] == [4, 32, 100, True]
    assert (engine.info.max_seq_len, engine.info.num_kv_blocks) == (100, 32)
    assert "gather_generation_logits" not in llm.kwargs


async def test_a_share_of_the_memory(start: Start) -> None:
    await start(config=EngineConfig(kv_cache=KvCacheConfig(memory_fraction=0.25), max_seq_len=128))
    (llm,) = standins.behaviour().llms
    assert llm.kwargs["kv_cache_config"].free_gpu_memory_fraction == 0.25


async def test_an_engine_of_several_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standins.install_trtllm_build(monkeypatch, tmp_path / "bin")
    checkpoint = standins.make_checkpoint(tmp_path / "checkpoint", world_size=2)
    directory = build(checkpoint, tmp_path / "engine", LIMITS, on_line=lambda _: None)
    standins.install_tensorrt_llm(monkeypatch, tmp_path / "site", "1.2.1")
    engine = TensorRTLLMEngine(directory)
    await engine.start()
    (llm,) = standins.behaviour().llms
    assert llm.kwargs["tensor_parallel_size"] == 2
    assert engine.info.device == "cuda:0-1"
    weights = (directory / "rank0.engine", directory / "rank1.engine")
    assert engine.info.weights_bytes == sum(path.stat().st_size for path in weights)
    await engine.shutdown()


async def test_chunked_prefill_needs_an_engine_that_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standins.install_trtllm_build(monkeypatch, tmp_path / "bin")
    checkpoint = standins.make_checkpoint(tmp_path / "checkpoint")
    directory = build(
        checkpoint,
        tmp_path / "engine",
        LIMITS,
        extra_arguments=["--use_paged_context_fmha", "disable"],
        on_line=lambda _: None,
    )
    standins.install_tensorrt_llm(monkeypatch, tmp_path / "site", "1.2.1")
    engine = TensorRTLLMEngine(directory)
    await engine.start()
    with pytest.raises(ContextLengthError, match="at most 64"):
        engine.submit(make_request((1,) * 65))
    assert (await answer(engine, make_request((1,) * 64)))[0] == greedy((1,) * 64)
    await engine.shutdown()


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("engine", EngineConfig(threads=2), "threads is 2"),
        ("huggingface", EngineConfig(device="cpu"), "device is 'cpu'"),
        ("engine", EngineConfig(speculative=NGramDecodingConfig()), "speculative is NGram"),
        ("huggingface", EngineConfig(deterministic=True), "deterministic is True"),
        ("engine", EngineConfig(max_batch_size=9), "max_batch_size is 9.*at most 8"),
        ("engine", EngineConfig(max_seq_len=129), "max_seq_len is 129.*at most 128"),
        ("huggingface", EngineConfig(max_seq_len=257), "max_seq_len is 257.*at most 256"),
        (
            "engine",
            EngineConfig(kv_cache=KvCacheConfig(tokens_per_block=32)),
            "tokens_per_block is 32.*built with 16",
        ),
    ],
)
async def test_settings_that_cannot_be_honoured(
    start_kind: Start, kind: str, config: EngineConfig, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        await start_kind(kind, config=config)


@pytest.mark.parametrize(
    ("kind", "version", "error", "words"),
    [
        ("engine", "1.3.0rc1", UnsupportedCheckpointError, r"runs no engines.*--format hf"),
        ("huggingface", "1.2.1", UnsupportedCheckpointError, "llmserve build --backend"),
        ("engine", "0.20.0", ConfigError, "works with 1.1 and later"),
        ("engine", "unknown", ConfigError, "'unknown', which cannot be read"),
    ],
)
async def test_artefacts_for_another_generation(
    start_kind: Start, kind: str, version: str, error: type[LlmserveError], words: str
) -> None:
    with pytest.raises(error, match=words):
        await start_kind(kind, version=version)


async def test_not_installed(models: dict[str, Path]) -> None:
    engine = TensorRTLLMEngine(models["engine"])
    with pytest.raises(ConfigError, match=r"pip install tensorrt-llm --extra.*needs nothing more"):
        await engine.start()


@pytest.mark.parametrize(
    ("older", "newer"),
    [("1.2.1", "1.3.0rc1"), ("1.3.0rc9", "1.3.0rc24"), ("1.3.0rc24", "1.3.0"), ("1.3.0", "1.4.0")],
)
def test_the_order_of_releases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: str, newer: str
) -> None:
    releases = []
    for version in (older, newer):
        with monkeypatch.context() as patch:
            standins.install_tensorrt_llm(patch, tmp_path / version, version)
            releases.append(installed_release())
    first, second = releases
    assert first is not None
    assert second is not None
    assert first.key < second.key
    assert first.has_engines == older.startswith("1.2")
    assert second.has_penalties == (newer != "1.3.0rc1")


def test_it_is_imported_by_nothing_that_does_not_need_it() -> None:
    program = "import sys, llmserve.llm, llmserve.engine.tensorrt_llm\n"
    program += "sys.exit(bool({'tensorrt_llm', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
