"""`llmserve serve` with the stand-in in its Python environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests import standins
from tests.e2e.serving import serve
from tests.engine.tensorrt_llm.factories import PROMPT, VERSIONS


@pytest.fixture
def installed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = standins.install_tensorrt_llm(monkeypatch, tmp_path / "site", VERSIONS[kind])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def test_a_server(installed: None, kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    engine_only = ("--gather-generation-logits",) if kind == "engine" else ()
    options = ("--max-seq-len", 100, "--kv-cache-memory", "1GiB", *engine_only)
    backend = () if kind == "engine" else ("--backend", "tensorrt-llm")
    with serve(models[kind], tmp_path / "log", *options, *backend) as server:
        body = {"model": models[kind].name, "prompt": PROMPT, "temperature": 0, "logprobs": 1}
        response = httpx.post(f"{server.url}/v1/completions", json={**body, "max_tokens": 7})
        (choice,) = response.json()["choices"]
        assert choice["finish_reason"] == "length"
        assert len(choice["logprobs"]["tokens"]) == 7
        response = httpx.post(f"{server.url}/v1/completions", json={**body, "max_tokens": 97})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert server.metric("llmserve:request_success_total") == 1
    log = (tmp_path / "log").read_text()
    tokens = 64 * (16 if kind == "engine" else 32)  # in the stand-in's 64 blocks
    assert f"the KV cache holds {tokens:,} tokens" in log
    assert "FP8 weights" in log


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("engine", ["--threads", "2"], "threads is 2"),
        ("huggingface", ["--backend", "tensorrt-llm", "--dtype", "float16"], "dtype is 'float16'"),
    ],
)
def test_options_that_cannot_be_honoured(
    installed: None, models: dict[str, Path], kind: str, options: list[str], words: str
) -> None:
    command = [sys.executable, "-m", "llmserve", "serve", str(models[kind]), "--port", "0"]
    result = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
