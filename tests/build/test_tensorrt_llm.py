"""trtllm-build, run through a stand-in that has its flags and leaves its files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve import artifacts, cli
from llmserve.build.tensorrt_llm import build
from llmserve.config import BuildConfig
from llmserve.convert.converter import convert
from llmserve.errors import CheckpointError, ConfigError, UnsupportedCheckpointError
from tests.models import make_llama
from tests.processes import has_ended
from tests.standins import (
    install_tensorrt_llm,
    install_trtllm_build,
    make_checkpoint,
    make_huggingface,
)
from tests.tokenizer_files import write_tokenizer

LIMITS = BuildConfig(max_batch_size=4, max_num_tokens=64, max_seq_len=128, tokens_per_block=16)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install_trtllm_build(monkeypatch, tmp_path / "bin")


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def build_config(engine: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((engine / "config.json").read_text())["build_config"]
    return config


def test_an_engine_with_its_companions(
    checkpoint: Path, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint / "quality.json").write_text('{"top1": 1.0}')
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    lines: list[str] = []
    engine = build(checkpoint, tmp_path / "engine", LIMITS, on_line=lines.append)
    assert engine == tmp_path / "engine"
    tokenizer_files = names(write_tokenizer(tmp_path / "tokenizer"))
    assert names(engine) == {"config.json", "rank0.engine", "quality.json", *tokenizer_files}
    assert (engine / "quality.json").read_text() == '{"top1": 1.0}'
    for name in tokenizer_files:
        assert (engine / name).read_bytes() == (checkpoint / name).read_bytes()
    built = build_config(engine)
    limits = ("max_batch_size", "max_num_tokens", "max_seq_len", "max_input_len")
    # trtllm-build's own default would end prompts at 1024 tokens.
    assert [built[name] for name in limits] == [4, 64, 128, 128]
    assert built["plugin_config"]["tokens_per_block"] == 16
    assert names(here) == set()  # no timing cache, which its default puts there
    assert lines[0] == "[TensorRT-LLM] TensorRT-LLM version: 1.2.1"
    assert "building rank 0" in lines[1]


def test_the_models_own_length_is_the_default(
    checkpoint: Path, program: Path, tmp_path: Path
) -> None:
    built = build_config(build(checkpoint, tmp_path / "engine"))
    assert (built["max_seq_len"], built["max_input_len"]) == (256, 256)
    long = make_checkpoint(tmp_path / "long", max_position_embeddings=4096)
    assert build_config(build(long, tmp_path / "long engine"))["max_input_len"] == 4096
    unlimited = make_checkpoint(tmp_path / "unlimited", max_position_embeddings=None)
    with pytest.raises(ConfigError, match="--max-seq-len"):
        build(unlimited, tmp_path / "other")


def test_weights_that_it_would_quantise_again(program: Path, tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", dtype=torch.bfloat16)
    plain = convert(source, tmp_path / "plain", quant="w8a16")
    build(plain, tmp_path / "engine", LIMITS)
    exported = convert(source, tmp_path / "w8a16", quant="w8a16", checkpoint_format="hf")
    stored = convert(exported, tmp_path / "stored")
    with pytest.raises(UnsupportedCheckpointError, match=r"INT8 already.*--backend native"):
        build(stored, tmp_path / "other", LIMITS)
    assert not (tmp_path / "other").exists()


def test_extra_arguments(checkpoint: Path, program: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timing"
    extra = ["--gemm_plugin", "bfloat16", "--output_timing_cache", str(cache)]
    engine = build(checkpoint, tmp_path / "engine", LIMITS, extra_arguments=extra)
    assert build_config(engine)["plugin_config"]["gemm_plugin"] == "bfloat16"
    assert cache.exists()
    for flag in ("--output_dir", "--max_seq_len=5", "--tokens_per_block"):
        with pytest.raises(ConfigError, match=flag.partition("=")[0]):
            build(checkpoint, tmp_path / "other", LIMITS, extra_arguments=[flag, "5"])
    with pytest.raises(CheckpointError, match=r"exited with 2(.|\n)*--frobnicate"):
        build(checkpoint, tmp_path / "other", LIMITS, extra_arguments=["--frobnicate"])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("fail", r"exited with 3(.|\n)*Unsupported architecture"),
        ("die", "killed by SIGKILL"),
        ("no_config", r"no config\.json of an engine"),
        ("missing_rank", r"no rank1\.engine; the checkpoint has 2 ranks"),
    ],
)
def test_a_failure_leaves_nothing(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, words: str
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", world_size=2)
    monkeypatch.setenv("STANDIN_TRTLLM_BUILD", how)
    before = names(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        build(checkpoint, tmp_path / "engine", LIMITS)
    assert names(tmp_path) == before
    monkeypatch.delenv("STANDIN_TRTLLM_BUILD")
    assert {"rank0.engine", "rank1.engine"} < names(build(checkpoint, tmp_path / "engine", LIMITS))


def test_ctrl_c_ends_it_and_its_workers(
    checkpoint: Path, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_TRTLLM_BUILD", "hang")
    before = names(tmp_path)
    command = [sys.executable, "-m", "llmserve", "build", checkpoint, tmp_path / "engine"]
    llmserve = subprocess.Popen(
        [*map(str, command), "--backend", "tensorrt-llm"], stderr=subprocess.PIPE, text=True
    )
    assert llmserve.stderr is not None
    line = next(line for line in llmserve.stderr if line.startswith("pids"))
    pids = [int(pid) for pid in line.split()[1:]]
    assert names(tmp_path) > before  # a staged directory
    llmserve.send_signal(signal.SIGINT)
    assert llmserve.wait(20) == 130
    llmserve.stderr.close()
    assert all(has_ended(pid) for pid in pids)
    assert names(tmp_path) == before


def test_workers_that_are_left_behind_do_not_hold_it_up(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "trtllm-build"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nsleep 600 &\necho worker $!\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    lines: list[str] = []
    with pytest.raises(CheckpointError, match="exited with 1"):
        build(checkpoint, tmp_path / "engine", on_line=lines.append)
    assert has_ended(int(lines[0].split()[1]))


def test_without_it_the_error_says_what_to_do(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"pip install 'tensorrt-llm<1\.3'.*pypi\.nvidia\.com.*nat"
    ):
        build(checkpoint, tmp_path / "engine")
    with pytest.raises(CheckpointError, match="run `llmserve convert` first"):
        build(make_huggingface(tmp_path / "hf"), tmp_path / "engine")


def test_with_1_3_there_is_no_engine_to_build(
    checkpoint: Path, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_tensorrt_llm(monkeypatch, tmp_path / "site", "1.3.0rc5")
    with pytest.raises(ConfigError, match=r"1\.3\.0rc5 .*`llmserve convert --format hf"):
        build(checkpoint, tmp_path / "engine")


def test_the_command(
    checkpoint: Path, program: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "engine"
    command = ["build", str(checkpoint), str(engine), "--max-seq-len", "64"]
    assert cli.main([*command, "--trtllm-build-args=--fast_build"]) == 1
    assert "--trtllm-build-args is for --backend tensorrt-llm" in capfd.readouterr().err
    extra = "--trtllm-build-args=--gemm_plugin 'bfloat16'"
    assert cli.main([*command, "--backend", "tensorrt-llm", extra]) == 0
    captured = capfd.readouterr()
    assert "building rank 0" in captured.err
    assert f"llmserve serve {engine}" in captured.out
    assert build_config(engine)["max_seq_len"] == 64
    assert build_config(engine)["plugin_config"]["gemm_plugin"] == "bfloat16"


def test_missing_steps_are_done_in_the_cache(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMSERVE_CACHE", str(tmp_path / "cache"))
    source = make_llama(tmp_path / "source", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"not installed.*pip install tensorrt-llm"):
        artifacts.ensure_engine(source, backend="tensorrt-llm")
    install_tensorrt_llm(monkeypatch, tmp_path / "site", "1.2.1")
    engine = artifacts.ensure_engine(source, quant="w8a16", backend="tensorrt-llm")
    config = json.loads((engine / "config.json").read_text())
    assert config["pretrained_config"]["quantization"]["quant_algo"] == "W8A16"
    assert (engine / "rank0.engine").is_file()
    begun = time.time_ns()
    assert artifacts.ensure_engine(source, quant="w8a16", backend="tensorrt-llm") == engine
    assert (engine / "rank0.engine").stat().st_mtime_ns < begun
    native = artifacts.ensure_engine(source, quant="w8a16")
    assert native != engine
    with pytest.raises(ConfigError, match="is an engine for the native backend"):
        artifacts.ensure_engine(native, backend="tensorrt-llm")


def test_from_1_3_on_hugging_face_checkpoints_are_taken_as_they_are(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_tensorrt_llm(monkeypatch, tmp_path / "site", "1.3.0")
    source = make_huggingface(tmp_path / "hf")
    assert artifacts.ensure_engine(source, backend="tensorrt-llm") == source
    with pytest.raises(ConfigError, match="quant is 'w8a16'"):
        artifacts.ensure_engine(source, quant="w8a16", backend="tensorrt-llm")
    with pytest.raises(UnsupportedCheckpointError, match="convert --format hf"):
        artifacts.ensure_engine(checkpoint, backend="tensorrt-llm")
