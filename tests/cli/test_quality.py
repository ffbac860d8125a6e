"""``llmserve quality`` and the options of calibration, as a user types them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from llmserve import cli
from llmserve.checkpoint.quality_file import read_quality
from llmserve.cli.calibration_options import (
    add_calibration_options,
    calibration_config,
    quality_config,
)
from llmserve.cli.quality import chat_renderer
from llmserve.config import CalibrationConfig, QualityConfig
from llmserve.convert.converter import convert
from llmserve.errors import ConfigError
from tests.models import make_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of Hugging Face's and one with quantised weights."""
    root = tmp_path_factory.mktemp("models")
    source = make_llama(root / "hf", dtype=torch.bfloat16)
    return source, convert(source, root / "out", quant="fp8_rowwise")


def test_the_figures_are_shown_and_kept(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, candidate = models
    command = ["quality", str(source), str(candidate), "--samples", "3", "--seq-len", "40"]
    assert cli.main([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    kept = json.loads((candidate / "quality.json").read_text())
    assert kept["measurement"] == shown
    assert (shown["num_samples"], shown["num_tokens"]) == (3, 3 * 39)
    assert (shown["reference"], shown["candidate"]) == ("bfloat16", "FP8_PER_CHANNEL_PER_TOKEN")
    assert 0 < shown["mean_kl"] < shown["max_kl"] < 1

    kept["quantization_error"] = {f"w{i}": i / 100 for i in range(7)}
    (candidate / "quality.json").write_text(json.dumps(kept))
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    assert f"{shown['perplexity']:.4f}" in table
    assert f"{shown['mean_kl']:.6f} nats" in table
    assert "117 tokens in 3 samples of llmserve's held-out text" in table
    assert "of 7 quantised weights" in table
    assert [line.split()[1] for line in table.splitlines()[-5:]] == ["w6", "w5", "w4", "w3", "w2"]
    quality = read_quality(candidate)
    assert quality is not None
    assert len(quality.quantization_error) == 7


def test_a_missed_limit_is_exit_code_1_and_says_which(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quality", *map(str, models), "--samples", "2", "--seq-len", "20"]
    assert cli.main([*command, "--max-kl", "1", "--min-top1", "0.1"]) == 0
    capsys.readouterr()
    assert cli.main([*command, "--max-kl", "1e-9"]) == 1
    captured = capsys.readouterr()
    assert "perplexity" in captured.out
    assert "above the limit of 1e-09 (--max-kl)" in captured.err
    assert "--min-top1" not in captured.err
    # What was measured is kept all the same: it is true.
    quality = read_quality(models[1])
    assert quality is not None
    assert quality.measurement is not None
    assert quality.measurement.num_tokens == 2 * 19


def test_a_conversion_shows_what_it_measured_before_a_limit_stops_it(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "own.jsonl"
    text.write_text(json.dumps({"token_ids": list(range(40))}) + "\n")
    command = ["convert", str(models[0]), str(tmp_path / "out"), "--quant", "fp8_rowwise"]
    command += ["--quality-text", str(text), "--max-kl"]
    assert cli.main([*command, "1e-9"]) == 1
    missed = capsys.readouterr()
    assert "39 tokens in 1 samples of own.jsonl" in missed.out
    assert "largest errors of" in missed.out
    assert "above the limit of 1e-09" in missed.err
    assert list(tmp_path.iterdir()) == [text]
    # What can't be judged is told before anything is converted.
    assert cli.main([*command, "1", "--quality-text", "none.txt"]) == 1
    missing = capsys.readouterr().err
    assert "there is no text none.txt" in missing
    assert "convert: " not in missing
    assert cli.main([*command, "1"]) == 0
    kept, _, last = capsys.readouterr().out.rpartition("wrote the checkpoint")
    assert kept == missed.out
    assert last


def test_a_text_of_ones_own_and_chats(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "own.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    text.write_text(json.dumps({"messages": messages}) + "\n")
    assert cli.main(["quality", *map(str, models), "--text", str(text), "--json"]) == 0
    captured = capsys.readouterr()
    shown = json.loads(captured.out)
    # <s><|user|>hi<|end|><|assistant|>yes<|end|>: all of these but the first are predicted.
    assert (shown["text"], shown["num_tokens"]) == ("own.jsonl", 8)
    render = chat_renderer(models[0])
    assert render is not None
    assert render(messages) == "<s><|user|>hi<|end|><|assistant|>yes<|end|>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "{candidate}"], "missing"),
        (["{source}", "missing"], "missing"),
        (["{source}", "{candidate}", "--text", "none.txt"], "there is no text none.txt"),
        (["{source}", "{candidate}", "--seq-len", "1"], "quality_seq_len is 1"),
        (["{source}", "{candidate}", "--min-top1", "95"], "min_top1 is 95"),
        (["{source}", "{candidate}", "--max-kl", "-1"], "max_kl is -1"),
        (["{source}", "{candidate}", "--max-kl", "nan"], "max_kl is nan; it must be at least 0"),
        (["{source}", "{candidate}", "--min-top1", "nan"], "min_top1 is nan"),
    ],
)
def test_mistakes(
    models: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    source, candidate = models
    typed = [word.format(source=source, candidate=candidate) for word in arguments]
    assert cli.main(["quality", *typed]) == 1
    assert message in capsys.readouterr().err


def _parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_calibration_options(parser)
    return parser.parse_args(words)


def test_calibration_options() -> None:
    assert calibration_config(_parse(), calibrated=True) == CalibrationConfig()
    assert calibration_config(_parse(), calibrated=False) == CalibrationConfig()
    words = ["--calib", "a.txt", "--calib-samples", "8", "--calib-seq-len", "16"]
    args = _parse(*words, "--calib-seed", "0", "--kv-cache-dtype", "int8", "--smoothquant", "0.7")
    assert calibration_config(args, calibrated=True) == CalibrationConfig(
        path=Path("a.txt"), samples=8, seq_len=16, seed=0
    )
    assert (args.kv_cache_dtype, args.smoothquant) == ("int8", 0.7)
    for option in (["--calib", "a.txt"], ["--calib-seq-len", "9"], ["--calib-seed", "1234"]):
        with pytest.raises(ConfigError, match=f"{option[0]} is given and nothing is calibrated"):
            calibration_config(_parse(*option), calibrated=False)
    with pytest.raises(ConfigError, match="calib_samples is 0; it must be at least 1"):
        calibration_config(_parse("--calib-samples", "0"), calibrated=True)


def test_quality_options() -> None:
    assert quality_config(_parse()) == QualityConfig()
    assert not quality_config(_parse()).wanted
    assert quality_config(_parse("--quality")).wanted
    assert quality_config(_parse("--max-kl", "0.1")) == QualityConfig(max_kl=0.1)
    assert quality_config(_parse("--min-top1", "0.9")).wanted
    with pytest.raises(ConfigError, match="--quality-text is given and nothing is measured"):
        quality_config(_parse("--quality-text", "a.txt"))
