"""Reads and writes the JSON files of artefacts, and tells artefacts apart by their config.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from llmserve.errors import CheckpointError, CheckpointNotFoundError

CONFIG_FILE = "config.json"
# Where a Hugging Face checkpoint has its weights: one file, or an index of several.
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ArtifactKind = Literal["huggingface", "checkpoint", "engine", "tensorrt_llm_engine"]
KIND_NAMES: dict[ArtifactKind, str] = {
    "huggingface": "a Hugging Face checkpoint",
    "checkpoint": "a TensorRT-LLM checkpoint",
    "engine": "an engine",
    "tensorrt_llm_engine": "an engine of TensorRT-LLM itself",
}


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CheckpointError: It cannot be read, or is no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(f"there is no file {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return data


def _no_constant(name: str) -> float:
    # Python reads these and JSON has none: no setting of a model can be one.
    raise ValueError(f"{name} is no number")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write an object durably, indented by 4 as TensorRT-LLM does."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=4) + "\n")
        file.flush()
        os.fsync(file.fileno())


def artifact_kind(directory: Path) -> ArtifactKind:
    """Tell what a directory is, by the keys of its config.json: TensorRT-LLM's rule.

    Returns:
        'engine' for a native engine, 'tensorrt_llm_engine' for one of TensorRT-LLM's own,
        'checkpoint' for a TensorRT-LLM checkpoint, else 'huggingface'.

    Raises:
        CheckpointNotFoundError: No directory, or no config.json in it.
        CheckpointError: config.json is damaged or none of these.
    """
    if not directory.is_dir():
        raise CheckpointNotFoundError(f"there is no directory {directory}")
    if not (directory / CONFIG_FILE).is_file():
        raise CheckpointNotFoundError(
            f"{directory} has no config.json: it is neither a Hugging Face checkpoint nor a "
            "TensorRT-LLM checkpoint nor an engine"
        )
    data = read_json_object(directory / CONFIG_FILE)
    if "pretrained_config" in data and "build_config" in data:
        return "engine" if data.get("backend") == "native" else "tensorrt_llm_engine"
    if "architecture" in data and "dtype" in data:
        return "checkpoint"
    if "model_type" in data or "architectures" in data:
        return "huggingface"
    raise CheckpointError(
        f"{directory / CONFIG_FILE} has neither model_type (Hugging Face) nor architecture "
        "(TensorRT-LLM checkpoint) nor pretrained_config (engine)"
    )


def check_kind(directory: Path, wanted: ArtifactKind) -> None:
    """Check that a directory is what a command takes.

    Raises:
        CheckpointNotFoundError: No directory, or no config.json in it.
        CheckpointError: It is another artefact, or none.
    """
    if (kind := artifact_kind(directory)) != wanted:
        needs_convert = (kind, wanted) == ("huggingface", "checkpoint")
        advice = "; run `llmserve convert` first" if needs_convert else ""
        name = KIND_NAMES[wanted].removeprefix("a ")
        raise CheckpointError(f"{directory} is no {name} but {KIND_NAMES[kind]}{advice}")
