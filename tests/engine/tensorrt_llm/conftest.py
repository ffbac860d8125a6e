"""Engines over the stand-in, of both generations.

Where a test says nothing else, it runs with a TensorRT engine under 1.2 and with a Hugging Face
checkpoint under 1.3.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from llmserve.build.tensorrt_llm import build
from llmserve.config import EngineConfig
from llmserve.engine.tensorrt_llm import TensorRTLLMEngine
from tests import standins
from tests.engine.tensorrt_llm.factories import LIMITS, VERSIONS, Start


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each generation serves; the engine as `llmserve build` leaves it."""
    root = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as monkeypatch:
        standins.install_trtllm_build(monkeypatch, root / "bin")
        checkpoint = standins.make_checkpoint(root / "checkpoint")
        engine = build(checkpoint, root / "engine", LIMITS, on_line=lambda _: None)
    return {"engine": engine, "huggingface": standins.make_huggingface(root / "huggingface")}


@pytest.fixture(params=["engine", "huggingface"])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
async def start_kind(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Start]:
    """Start engines of a kind; all are shut down at the end, and must be empty then."""
    engines: list[TensorRTLLMEngine] = []

    async def start(
        kind: str, version: str | None = None, config: EngineConfig | None = None, **settings: Any
    ) -> TensorRTLLMEngine:
        if not engines:
            site = tmp_path / "site"
            standins.install_tensorrt_llm(monkeypatch, site, version or VERSIONS[kind])
        config = config or EngineConfig(max_seq_len=128)
        engine = TensorRTLLMEngine(models[kind], config, **settings)
        engines.append(engine)
        await engine.start()
        standins.behaviour().submitted.clear()  # the warm-up
        return engine

    yield start
    if "tensorrt_llm" in sys.modules:
        standins.behaviour().running.set()
    for engine in engines:
        await engine.shutdown()
        assert engine._open == {}
    assert {task.get_name() for task in asyncio.all_tasks()} == {
        asyncio.current_task().get_name()  # type: ignore[union-attr]
    }
    standins.forget_tensorrt_llm()


@pytest.fixture
def start(start_kind: Start, kind: str) -> Start:
    async def start(**settings: Any) -> TensorRTLLMEngine:
        return await start_kind(kind, **settings)

    return start
