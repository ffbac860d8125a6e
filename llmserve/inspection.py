"""What a directory is: kind, architecture, quantisation, ranks and tensors. Reads headers only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.config_file import (
    CONFIG_FILE,
    ArtifactKind,
    artifact_kind,
    read_json_object,
)
from llmserve.checkpoint.decoder_tensors import layer_linears, plain_tensors, tied_without_lm_head
from llmserve.checkpoint.engine_dir import rank_files, read_engine
from llmserve.checkpoint.huggingface import HuggingFaceCheckpoint
from llmserve.checkpoint.reader import RankReader
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.config import BuildConfig, ConvertConfig
from llmserve.convert.target_config import target_config
from llmserve.errors import UnsupportedCheckpointError


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor on disk.

    Attributes:
        file: The file's name.
        name: The tensor's.
        spec: Shape and dtype.
    """

    file: str
    name: str
    spec: TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a directory holds.

    Attributes:
        path: The directory.
        kind: Which artefact it is.
        config: The model as TensorRT-LLM describes it; of a Hugging Face checkpoint, what it would
            be converted to without quantisation.
        build: Of an engine, its limits.
        tensors: All of them, file by file.
    """

    path: Path
    kind: ArtifactKind
    config: PretrainedConfig
    build: BuildConfig | None
    tensors: list[TensorEntry]

    @property
    def num_parameters(self) -> int:
        """Elements of all plain tensors of the whole model."""
        return sum(math.prod(spec.shape) for spec in plain_tensors(self.config).values())

    @property
    def num_active_parameters(self) -> int:
        """Those that one token goes through: of a mixture, the experts it is sent to."""
        moe = self.config.moe
        if moe is None:
            return self.num_parameters
        shapes = [
            linear.weight
            for linear in layer_linears(self.config).values()
            if len(linear.weight) == 3
        ]
        idle = (moe.num_experts - moe.top_k) * sum(math.prod(shape[1:]) for shape in shapes)
        return self.num_parameters - idle * self.config.num_hidden_layers

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(entry.spec.nbytes for entry in self.tensors)


def describe(path: Path, settings: ConvertConfig | None = None) -> Description:
    """Look at a directory.

    Args:
        path: A Hugging Face checkpoint, a TensorRT-LLM checkpoint or a native engine.
        settings: Of a Hugging Face checkpoint: what it would be converted to.

    Raises:
        CheckpointError: It is none of these, or damaged.
        UnsupportedCheckpointError: A model or a quantisation that is not implemented, or an engine
            of TensorRT-LLM itself.
    """
    kind = artifact_kind(path)
    if kind == "huggingface":
        with HuggingFaceCheckpoint(path) as checkpoint:
            entries = [
                TensorEntry(checkpoint.file_of(name).name, name, checkpoint.spec(name))
                for name in checkpoint.names()
            ]
            config = target_config(checkpoint, settings or ConvertConfig())
        entries.sort(key=lambda entry: (entry.file, entry.name))
        return Description(path=path, kind=kind, config=config, build=None, tensors=entries)
    if kind == "tensorrt_llm_engine":
        raise UnsupportedCheckpointError(
            f"{path} is an engine of TensorRT-LLM itself: its tensors are in a plan that only "
            "TensorRT reads; inspect the checkpoint that it was built from"
        )
    build: BuildConfig | None = None
    if kind == "engine":
        config, build = read_engine(path)
    else:
        config = PretrainedConfig.from_dict(read_json_object(path / CONFIG_FILE))
    entries = [entry for file in rank_files(path, config) for entry in _entries(file)]
    config = tied_without_lm_head(config, {entry.name for entry in entries})
    return Description(path=path, kind=kind, config=config, build=build, tensors=entries)


def _entries(file: Path) -> list[TensorEntry]:
    with RankReader(file) as reader:
        return [TensorEntry(file.name, name, reader.spec(name)) for name in reader.names()]
