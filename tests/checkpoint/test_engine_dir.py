import json
from pathlib import Path
from typing import Any

import pytest

from llmserve.checkpoint.config import ParallelMapping
from llmserve.checkpoint.config_file import artifact_kind
from llmserve.checkpoint.engine_dir import rank_file, rank_files, read_engine, write_engine_config
from llmserve.config import BuildConfig
from llmserve.errors import CheckpointError, CheckpointNotFoundError, UnsupportedCheckpointError
from tests.checkpoint.factories import pretrained_config

_LIMITS = BuildConfig(max_batch_size=3, max_num_tokens=40, max_seq_len=50, tokens_per_block=8)


def test_an_engine_config_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_engine_config(tmp_path, pretrained_config(), _LIMITS)
    (tmp_path / rank_file(0)).touch()
    assert read_engine(tmp_path) == (pretrained_config(), _LIMITS)
    build_config = json.loads((tmp_path / "config.json").read_text())["build_config"]
    # TensorRT-LLM's places for these.
    assert build_config["max_batch_size"] == 3
    assert build_config["plugin_config"]["tokens_per_block"] == 8


def test_every_rank_has_a_file(tmp_path: Path) -> None:
    config = pretrained_config(mapping=ParallelMapping.tensor_parallel(2))
    write_engine_config(tmp_path, config, _LIMITS)
    for rank in range(2):
        with pytest.raises(
            CheckpointNotFoundError, match=rf"rank{rank}\.safetensors: .* of rank {rank} of 2"
        ):
            read_engine(tmp_path)
        (tmp_path / rank_file(rank)).touch()
    assert read_engine(tmp_path) == (config, _LIMITS)
    assert rank_files(tmp_path, config) == [
        tmp_path / name for name in ("rank0.safetensors", "rank1.safetensors")
    ]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"version": "0"}, CheckpointError, "build the engine again"),
        ({"backend": None}, UnsupportedCheckpointError, "TensorRT-LLM itself"),
        ({"build_config": {"max_seq_len": 5}}, CheckpointError, "damaged"),
        ({"build_config": 5}, CheckpointError, "damaged"),
    ],
)
def test_a_damaged_engine_is_named(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    write_engine_config(tmp_path, pretrained_config(), _LIMITS)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=words):
        read_engine(tmp_path)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "llama"}, "huggingface"),
        ({"architectures": ["X"]}, "huggingface"),
        ({"architecture": "X", "dtype": "float16"}, "checkpoint"),
        ({"pretrained_config": {}, "build_config": {}, "backend": "native"}, "engine"),
        ({"pretrained_config": {}, "build_config": {}}, "tensorrt_llm_engine"),
    ],
)
def test_artefacts_are_told_apart(tmp_path: Path, config: dict[str, Any], kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert artifact_kind(tmp_path) == kind


def test_what_is_no_artefact_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no directory"):
        artifact_kind(tmp_path / "nothing")
    with pytest.raises(CheckpointNotFoundError, match=r"no config\.json"):
        artifact_kind(tmp_path)
    for content in ("{", "[]", "{}"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            artifact_kind(tmp_path)
