import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llmserve.artifacts import default_cache_dir, ensure_engine
from llmserve.build.native import build
from llmserve.checkpoint.engine_dir import read_engine
from llmserve.config import BuildConfig
from llmserve.convert.converter import convert
from llmserve.errors import CheckpointError, ConfigError, UnsupportedCheckpointError
from tests.models import make_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("hf") / "tiny", dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _entries(cache: Path) -> list[Path]:
    return [path for path in (cache / "engines").iterdir() if path.suffix != ".lock"]


def test_an_engine_is_taken_as_it_is(source: Path, tmp_path: Path, cache: Path) -> None:
    engine = build(convert(source, tmp_path / "checkpoint"), tmp_path / "engine")
    assert ensure_engine(engine) == engine
    assert ensure_engine(str(engine)) == engine
    assert not cache.exists()


@pytest.mark.parametrize("kind", ["huggingface", "checkpoint"])
def test_what_is_missing_is_made_once(source: Path, tmp_path: Path, cache: Path, kind: str) -> None:
    model = source if kind == "huggingface" else convert(source, tmp_path / "tiny")
    stages: set[str] = set()
    engine = ensure_engine(model, report=lambda stage, done, total: stages.add(stage))
    assert stages == ({"convert", "build"} if kind == "huggingface" else {"build"})
    assert read_engine(engine)[1].max_seq_len == 512
    assert engine.name.startswith("tiny-")
    assert _entries(cache) == [engine]  # and not the checkpoint between

    def nothing(stage: str, done: int, total: int) -> None:
        pytest.fail(f"{stage} ran again")

    assert ensure_engine(model, report=nothing) == engine


def test_other_settings_are_other_engines(source: Path) -> None:
    plain = ensure_engine(source)
    quantised = ensure_engine(source, quant="w8a16")
    half = ensure_engine(source, dtype="float16")
    short = ensure_engine(source, build_config=BuildConfig(max_seq_len=64))
    assert len({plain, quantised, half, short}) == 4
    assert read_engine(quantised)[0].quantization.quant_algo == "W8A16"
    assert read_engine(half)[0].dtype == "float16"
    assert read_engine(short)[1].max_seq_len == 64
    assert ensure_engine(source, quant="none") == plain


def test_a_changed_source_is_another_engine(source: Path, tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", seed=1, tokenizer=False)
    first = ensure_engine(model)
    make_llama(model, seed=2, tokenizer=False)
    weights = model / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert ensure_engine(model) != first


def test_a_failure_leaves_nothing_to_find(tmp_path: Path, cache: Path) -> None:
    model = make_llama(tmp_path / "model", tokenizer=False)
    with pytest.raises(ConfigError, match="max_seq_len is 1000"):
        ensure_engine(model, build_config=BuildConfig(max_seq_len=1000))
    assert _entries(cache) == []


def test_who_comes_second_waits_for_the_first(source: Path) -> None:
    # Threads do for processes: a lock belongs to the descriptor, and each opens its own.
    def ensure(_: int) -> set[str]:
        stages: set[str] = set()
        ensure_engine(source, report=lambda stage, done, total: stages.add(stage))
        return stages

    with ThreadPoolExecutor(3) as pool:
        results = sorted(pool.map(ensure, range(3)), key=len)
    assert results == [set(), set(), {"build", "convert"}]


def test_what_a_killed_process_converted_is_used(source: Path, cache: Path) -> None:
    engine = ensure_engine(source)
    shutil.rmtree(engine)
    convert(source, engine.with_name(f"{engine.name}.checkpoint"))
    stages: set[str] = set()
    assert ensure_engine(source, report=lambda stage, done, total: stages.add(stage)) == engine
    assert stages == {"build"}
    assert _entries(cache) == [engine]


def test_fixed_weights_take_no_settings(source: Path, tmp_path: Path) -> None:
    checkpoint = convert(source, tmp_path / "checkpoint", quant="w8a16")
    engine = build(checkpoint, tmp_path / "engine")
    for path, what in ((checkpoint, "a TensorRT-LLM checkpoint"), (engine, "an engine")):
        with pytest.raises(ConfigError, match=f"quant is 'none', but .* is {what}"):
            ensure_engine(path, quant="none")
        with pytest.raises(ConfigError, match=f"dtype is 'float16', but .* is {what}"):
            ensure_engine(path, dtype="float16")
    with pytest.raises(ConfigError, match="quant is 'int3'"):
        ensure_engine(source, quant="int3")


def test_engines_of_tensorrt_llm_itself_are_taken_as_they_are(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"version": "1.2.1", "pretrained_config": {}, "build_config": {}})
    )
    assert ensure_engine(tmp_path) == tmp_path
    assert ensure_engine(tmp_path, backend="tensorrt-llm") == tmp_path
    assert not cache.exists()
    with pytest.raises(UnsupportedCheckpointError, match="native backend cannot run"):
        ensure_engine(tmp_path, backend="native")
    with pytest.raises(ConfigError, match="quant is 'w8a16'"):
        ensure_engine(tmp_path, quant="w8a16")


def test_a_cache_that_cannot_be_written_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="LLMSERVE_CACHE"):
        ensure_engine(source, cache_dir=tmp_path / "file")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert default_cache_dir() == cache
    monkeypatch.delenv("LLMSERVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_dir() == Path("/x/llmserve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_cache_dir() == Path("/home/me/.cache/llmserve")
