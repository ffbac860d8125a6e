from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from llmserve.batch.fingerprint import model_fingerprint
from llmserve.errors import CheckpointError


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"a": 1}')
    (directory / "rank0.safetensors").write_bytes(bytes(range(256)) * 4096 * 5)  # 5 MiB
    return directory


def test_a_copy_elsewhere_is_the_same_model(model_dir: Path, tmp_path: Path) -> None:
    before = model_fingerprint(model_dir)
    shutil.copytree(model_dir, tmp_path / "copy")
    os.utime(model_dir / "config.json", (1, 1))
    (model_dir / "README.md").write_text("a note")
    (model_dir / "quality.json").write_text("{}")
    assert model_fingerprint(tmp_path / "copy") == model_fingerprint(model_dir) == before


@pytest.mark.parametrize("name", ["config.json", "rank0.safetensors"])
@pytest.mark.parametrize("where", ["beginning", "end", "length", "gone"])
def test_any_change_that_counts_is_another_model(model_dir: Path, name: str, where: str) -> None:
    before = model_fingerprint(model_dir)
    path = model_dir / name
    content = bytearray(path.read_bytes())
    if where == "gone":
        path.unlink()
    else:
        if where == "length":
            content.append(0)
        else:
            content[0 if where == "beginning" else -1] ^= 1
        path.write_bytes(content)
    assert model_fingerprint(model_dir) != before


def test_weights_trained_further_differ_beyond_what_is_hashed_whole(model_dir: Path) -> None:
    before = model_fingerprint(model_dir)
    weights = model_dir / "rank0.safetensors"
    weights.write_bytes(bytes(255 - byte for byte in weights.read_bytes()))
    assert model_fingerprint(model_dir) != before


def test_an_unreadable_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*nowhere: No such file"):
        model_fingerprint(tmp_path / "nowhere")
