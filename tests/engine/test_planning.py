"""The plan against what can be counted: an engine's files, a pool, and a process's memory."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve.build.native import build
from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.engine_dir import read_engine
from llmserve.config import BuildConfig, CalibrationConfig, EngineConfig, KvCacheConfig
from llmserve.convert.converter import convert
from llmserve.core.sampling_params import SamplingParams
from llmserve.engine.planning import MemoryPlan, plan_memory, remedies
from llmserve.engine.process import ProcessEngine
from llmserve.engine.sizing import EngineLimits, num_kv_blocks, resolve_limits
from llmserve.runtime.memory import weights_bytes
from tests.checkpoint.factories import pretrained_config
from tests.engine.factories import drain, make_request
from tests.models import make_llama, make_model

GIB = 2**30
LIMITS = EngineLimits(max_batch_size=8, max_num_tokens=512, max_seq_len=1024, tokens_per_block=32)


def plan(config: PretrainedConfig, memory_bytes: int = GIB, **limits: int) -> MemoryPlan:
    return plan_memory(config, dataclasses.replace(LIMITS, **limits), memory_bytes)


def test_the_parts_add_up_to_the_memory() -> None:
    made = plan(pretrained_config())
    rest = made.memory_bytes - (
        made.process_bytes + made.weights_bytes + made.activation_bytes + made.kv_pool_bytes
    )
    assert made.fits
    assert 0 <= rest < made.kv_bytes_per_token * 32  # what is left is less than a block
    assert made.kv_tokens * made.kv_bytes_per_token == made.kv_pool_bytes


def test_k_and_v_of_a_token_by_hand() -> None:
    config = pretrained_config()
    by_hand = 2 * config.num_key_value_heads * config.head_size * config.num_hidden_layers
    assert config.dtype in ("float16", "bfloat16")
    assert plan(config).kv_bytes_per_token == 2 * by_hand
    eight_bit = dataclasses.replace(
        config, quantization=dataclasses.replace(config.quantization, kv_cache_quant_algo="INT8")
    )
    assert plan(eight_bit).kv_bytes_per_token == by_hand


def test_windows_make_room_for_more_requests() -> None:
    sizes = {"num_hidden_layers": 4, "max_position_embeddings": 4096}
    limits = {"max_seq_len": 4096, "max_num_tokens": 256, "max_batch_size": 2048}
    full = plan(pretrained_config(**sizes), **limits)
    half = plan(pretrained_config(sliding_window=256, sliding_window_pattern=2, **sizes), **limits)
    assert half.kv_bytes_per_token == full.kv_bytes_per_token
    # 128 blocks of 32 tokens in the full layers; 256 + 256 tokens anywhere in the others: 17.
    assert full.full_requests == full.kv_blocks[0] // 128
    assert half.full_requests == half.kv_blocks[0] // 17 == half.kv_blocks[1] // 128
    assert half.full_requests == pytest.approx(full.full_requests * 256 / (128 + 17), rel=0.01)
    # The engine, given that pool, makes just these blocks of it.
    made = num_kv_blocks(half.kv_groups, half.limits, KvCacheConfig(), half.kv_pool_bytes)
    assert all(0 <= told - blocks <= 1 for told, blocks in zip(half.kv_blocks, made, strict=True))


@pytest.mark.parametrize("quant", ["none", "w8a16", "fp8_rowwise"])
def test_weights_are_those_of_the_engines_file(quant: str, tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", dtype=torch.bfloat16)
    engine = build(convert(source, tmp_path / "c", quant=quant), tmp_path / "engine")
    config, _ = read_engine(engine)
    file = engine / "rank0.safetensors"
    with file.open("rb") as opened:
        header = 8 + int.from_bytes(opened.read(8), "little")
    assert weights_bytes(config) == file.stat().st_size - header


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    config = pretrained_config()
    short = plan(config, plan(config).process_bytes)
    assert not short.fits
    assert (short.kv_tokens, short.full_requests) == (0, 0)
    enough = plan(config, short.memory_bytes + short.missing_bytes)
    assert enough.full_requests == 1
    assert not plan(config, enough.memory_bytes - 1).fits


def test_every_remedy_makes_it_fit() -> None:
    config = pretrained_config(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8
    )
    whole = plan(config)
    needed = whole.process_bytes + whole.weights_bytes + whole.activation_bytes
    # Room for little more than half of a full request: less of anything will do.
    short = plan(config, needed + 544 * whole.kv_bytes_per_token)
    found = remedies(short, config, can_quantize=True, can_split=True)
    assert "--max-seq-len 512" in found
    assert "--kv-cache-dtype fp8" in found
    assert "--quant w8a16" in found
    assert plan(config, short.memory_bytes, max_seq_len=512).fits
    fixed = remedies(short, config, can_quantize=False, can_split=False)
    assert fixed
    assert all(line.startswith("--max-") for line in fixed)
    # A source that is quantised already can still be split.
    split = remedies(short, config, can_quantize=False, can_split=True)
    assert split[: len(fixed)] == fixed
    assert all(line.startswith("--tp ") for line in split[len(fixed) :])
    assert len(split) > len(fixed)
    hopeless = plan(config, short.process_bytes)
    assert remedies(hopeless, config, can_quantize=True, can_split=True) == []


# Experts' rows and 8-bit K and V, which a step holds in other ways than a plain model's.
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
LARGE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "none": ("llama", {}, {}),
    "w8a16": ("llama", {}, {"quant": "w8a16"}),
    "experts": ("qwen3_moe", EXPERTS, {}),
    "int8_kv": (
        "llama",
        {},
        {"kv_cache_dtype": "int8", "calibration": CalibrationConfig(samples=2, seq_len=32)},
    ),
}


@pytest.fixture(
    scope="module",
    params=[
        "none",
        "w8a16",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("experts", "int8_kv")),
    ],
)
def large_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine whose weights, K and V outweigh the interpreter, and that computes little."""
    family, sizes, settings = LARGE[request.param]
    path = tmp_path_factory.mktemp(f"large-{request.param}")
    source = make_model(
        path / "hf",
        family,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=32768,
        # Of an embedding that is nothing else only the rows of tokens that occurred are resident.
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        **sizes,
    )
    return build(
        convert(source, path / "checkpoint", **settings),
        path / "engine",
        BuildConfig(max_num_tokens=512, max_batch_size=_requests(request.param), max_seq_len=1024),
    )


def _requests(name: str) -> int:
    """Those of 1024 tokens that fill a pool of 256 MiB."""
    return 16 if name == "int8_kv" else 4


async def test_the_process_takes_what_was_planned(large_engine: Path) -> None:
    """Within 10 % at its peak: every block of the cache written, all requests decoding together."""
    config, built = read_engine(large_engine)
    asked = EngineConfig(
        threads=2, device="cpu", kv_cache=KvCacheConfig(max_total_bytes=256 * 2**20)
    )
    planned = plan_memory(config, resolve_limits(asked, built), 2 * GIB)
    engine = ProcessEngine(large_engine, asked)
    await engine.start()
    try:
        assert engine.info.weights_bytes == pytest.approx(planned.weights_bytes, rel=0.02)
        pool = engine.info.kv_cache_bytes
        assert pool == engine.info.kv_cache_tokens * planned.kv_bytes_per_token
        assert built.max_seq_len is not None
        # Long enough that all are there at once, with all that a sampler does.
        params = SamplingParams(
            max_tokens=40, temperature=1.0, top_p=0.9, presence_penalty=0.5, logprobs=5, seed=0
        )
        requests = [
            dataclasses.replace(
                make_request(i, prompt_length=built.max_seq_len - 40), sampling_params=params
            )
            for i in range(engine.info.kv_cache_tokens // built.max_seq_len)
        ]
        assert len(requests) == built.max_batch_size
        await asyncio.gather(*(drain(engine.submit(request)) for request in requests))
        measured = _peak_resident_bytes(engine.info.pid)
    finally:
        await engine.shutdown()
    expected = planned.process_bytes + planned.weights_bytes + planned.activation_bytes + pool
    assert measured == pytest.approx(expected, rel=0.1)


def _peak_resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
        * 1024
    )
