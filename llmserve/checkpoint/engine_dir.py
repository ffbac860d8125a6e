"""An engine directory: ``config.json`` with what was built, a file per rank, the tokenizer.

config.json is ``{"version", "backend", "pretrained_config", "build_config"}``. ``build_config``
has TensorRT-LLM's key names (``tokens_per_block`` under ``plugin_config``, as there).
``"backend": "native"`` tells a native engine from TensorRT-LLM's own, which has no such key. Rank r
has its weights in ``rank{r}.safetensors``, as in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.config_file import CONFIG_FILE, read_json_object, write_json
from llmserve.config import BuildConfig
from llmserve.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    UnsupportedCheckpointError,
)

ENGINE_VERSION = "1"


def rank_file(rank: int) -> str:
    """The name of a rank's weights in a checkpoint or an engine."""
    return f"rank{rank}.safetensors"


def rank_files(directory: Path, config: PretrainedConfig) -> list[Path]:
    """The weights of every rank of a checkpoint or an engine, in order.

    Raises:
        CheckpointNotFoundError: One is missing.
    """
    paths = [directory / rank_file(rank) for rank in range(config.tp_size)]
    for rank, path in enumerate(paths):
        if not path.is_file():
            raise CheckpointNotFoundError(
                f"there is no file {path}: the weights of rank {rank} of {len(paths)} "
                "(mapping.tp_size in config.json)"
            )
    return paths


def write_engine_config(
    directory: Path, pretrained_config: PretrainedConfig, build_config: BuildConfig
) -> None:
    """Write a native engine's config.json; ``build_config.max_seq_len`` must be resolved."""
    write_json(
        directory / CONFIG_FILE,
        {
            "version": ENGINE_VERSION,
            "backend": "native",
            "pretrained_config": pretrained_config.to_dict(),
            "build_config": {
                "max_batch_size": build_config.max_batch_size,
                "max_num_tokens": build_config.max_num_tokens,
                "max_seq_len": build_config.max_seq_len,
                "max_beam_width": 1,
                "kv_cache_type": "PAGED",
                "plugin_config": {"tokens_per_block": build_config.tokens_per_block},
            },
        },
    )


def read_engine(directory: Path) -> tuple[PretrainedConfig, BuildConfig]:
    """Read what a native engine is; ``max_seq_len`` is never None in it.

    Raises:
        CheckpointNotFoundError: There is no config.json, or a rank's weights are missing.
        CheckpointError: It is damaged, or of another version.
        UnsupportedCheckpointError: It is TensorRT-LLM's own engine.
    """
    path = directory / CONFIG_FILE
    data = read_json_object(path)
    if "pretrained_config" not in data or "build_config" not in data:
        raise CheckpointError(f"{directory} is not an engine; run `llmserve build` first")
    if data.get("backend") != "native":
        raise UnsupportedCheckpointError(
            f"{directory} is an engine of TensorRT-LLM itself, which the native backend cannot "
            "run; serve it with --backend auto, or build a native one from its checkpoint with "
            "`llmserve build`"
        )
    if data.get("version") != ENGINE_VERSION:
        raise CheckpointError(
            f"{path} has version {data.get('version')!r}; this llmserve reads "
            f"{ENGINE_VERSION!r}: build the engine again with `llmserve build`"
        )
    try:
        build = _build_config(data["build_config"])
        config = PretrainedConfig.from_dict(data["pretrained_config"])
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); build the engine again") from error
    rank_files(directory, config)
    return config, build


def _build_config(data: Mapping[str, Any]) -> BuildConfig:
    return BuildConfig(
        max_batch_size=data["max_batch_size"],
        max_num_tokens=data["max_num_tokens"],
        # int() refuses a null: an engine's limit is always resolved.
        max_seq_len=int(data["max_seq_len"]),
        tokens_per_block=data["plugin_config"]["tokens_per_block"],
    )
