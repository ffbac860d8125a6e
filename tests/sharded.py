"""Ranks of a checkpoint, split here from one that was converted whole; and tensors in memory."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llmserve.checkpoint.config import ParallelMapping, PretrainedConfig
from llmserve.checkpoint.sharding import check_tp_size
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.quantization.layout import checkpoint_tensors, rank_shards


class DictSource:
    """Tensors in memory as a ``TensorSource``."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(tuple(self.tensors[name].shape), self.tensors[name].dtype)

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def shard_checkpoint(
    checkpoint: Path, path: Path, tp_size: int, *, use_parallel_embedding: bool = True
) -> Path:
    """Write a checkpoint of one rank again as one of ``tp_size``.

    Returns:
        ``path``.
    """
    shutil.copytree(checkpoint, path, ignore=shutil.ignore_patterns("rank*.safetensors"))
    config = replace(
        PretrainedConfig.from_dict(json.loads((checkpoint / "config.json").read_text())),
        mapping=ParallelMapping.tensor_parallel(tp_size),
        use_parallel_embedding=use_parallel_embedding,
    )
    check_tp_size(config, tp_size)
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    whole = load_file(checkpoint / "rank0.safetensors")
    for rank in range(tp_size):
        save_file(rank_part(config, whole, rank), path / f"rank{rank}.safetensors")
    return path


def rank_part(
    config: PretrainedConfig, whole: dict[str, torch.Tensor], rank: int
) -> dict[str, torch.Tensor]:
    """What a rank holds of a model's tensors."""
    shards = rank_shards(config, checkpoint_tensors(config), rank)
    return {name: shards[name].take(tensor).contiguous() for name, tensor in whole.items()}
