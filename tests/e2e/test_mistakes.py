"""What people get wrong on the command line: one line each, and nothing left over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.serving import DEMO, llmserve


def copy_of_the_demo(path: Path) -> Path:
    path.mkdir()
    for file in DEMO.iterdir():
        if file.suffix in (".json", ".safetensors", ".jinja"):
            shutil.copy(file, path)
    return path


def refused(source: Path, out: Path) -> str:
    """Convert, which has to fail; the one line it prints."""
    result = llmserve("convert", source, out)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if not line.startswith("convert: ")]
    assert len(lines) == 1, result.stderr
    assert not out.exists()
    assert [path for path in out.parent.iterdir() if path != source] == []
    return lines[0]


def test_a_wrong_path(tmp_path: Path) -> None:
    assert "nowhere" in refused(tmp_path / "nowhere", tmp_path / "out")


def test_a_half_downloaded_checkpoint(tmp_path: Path) -> None:
    source = copy_of_the_demo(tmp_path / "source")
    weights = source / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    assert "model.safetensors" in refused(source, tmp_path / "out")
    weights.unlink()
    assert "safetensors" in refused(source, tmp_path / "out")


def test_an_unsupported_architecture(tmp_path: Path) -> None:
    source = copy_of_the_demo(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    (source / "config.json").write_text(json.dumps(config))
    assert "mamba" in refused(source, tmp_path / "out").lower()


def test_pickles(tmp_path: Path) -> None:
    source = copy_of_the_demo(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    error = refused(source, tmp_path / "out")
    assert "pytorch_model.bin" in error
    assert "safetensors" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "nowhere/at-all/really"], "nowhere/at-all/really"),
        (["build", "nowhere", "out"], "nowhere"),
        (["batch", "run", "missing.jsonl", "-o", "o.jsonl", "--model", str(DEMO)], "missing.jsonl"),
    ],
)
def test_other_commands(arguments: list[str], words: str) -> None:
    result = llmserve(*arguments)
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_limits_of_an_engine_may_only_be_lowered(demo_engines: dict[str, Path]) -> None:
    engine = demo_engines["w8a16"]
    for option, value in (("--max-seq-len", 4096), ("--quant", "w8a16"), ("--dtype", "float32")):
        result = llmserve("serve", engine, option, value, "--port", 0)
        assert result.returncode == 1
        assert str(value) in result.stderr
        assert "Traceback" not in result.stderr
