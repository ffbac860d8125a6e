"""A Hugging Face checkpoint directory: config.json and one or several safetensors files.

It knows where tensors are and nothing of what they mean. Every file's header is read at the start,
so that a half-downloaded checkpoint is refused before any work is done.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llmserve.checkpoint.config_file import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, read_json_object
from llmserve.checkpoint.reader import RankReader
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.errors import CheckpointError, CheckpointNotFoundError, UnsupportedCheckpointError

_PICKLES = (
    "pytorch_model*.bin",
    "*.pt",
    "*.pth",
    "consolidated.*.pth",
    "pytorch_model.bin.index.json",
)


class HuggingFaceCheckpoint:
    """The tensors of a Hugging Face checkpoint. Use as a context manager.

    Args:
        path: The directory.

    Attributes:
        config: config.json's object.

    Raises:
        CheckpointNotFoundError: No directory, no config.json, or a shard is missing.
        UnsupportedCheckpointError: The weights are pickles.
        CheckpointError: A file is damaged, or the index and the shards disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise CheckpointNotFoundError(f"there is no directory {path}")
        self.config = read_json_object(path / CONFIG_FILE)
        self._files: dict[str, RankReader] = {}
        self._readers: dict[str, RankReader] = {}  # by tensor name
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> HuggingFaceCheckpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        for reader in self._files.values():
            reader.close()

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._readers)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor; see ``RankReader.spec``."""
        return self._reader(name).spec(name)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, mapped; see ``RankReader.tensor``."""
        return self._reader(name).tensor(name)

    def readers(self) -> list[RankReader]:
        """Its files, by name."""
        return [self._files[name] for name in sorted(self._files)]

    def open_for_reading(self) -> None:
        """Prepare ``read_into``; see ``RankReader.open_for_reading``."""
        for reader in self._files.values():
            reader.open_for_reading()

    def read_into(self, name: str, begin: int, out: torch.Tensor) -> None:
        """Fill ``out`` with a part of a tensor's bytes; see ``RankReader.read_into``."""
        self._reader(name).read_into(name, begin, out)

    def file_of(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._reader(name).path

    def _reader(self, name: str) -> RankReader:
        if name not in self._readers:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._readers[name]

    def _open(self) -> None:
        index_path = self.path / INDEX_FILE
        if not index_path.is_file():
            self._open_single()
            return
        index = read_json_object(index_path).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(f, str) for f in index.values()):
            raise CheckpointError(f"{index_path} has no weight_map of file names")
        shards = sorted(set(index.values()))
        missing = [shard for shard in shards if not (self.path / shard).is_file()]
        if missing:
            raise CheckpointNotFoundError(
                f"{self.path} lacks {missing[0]}, {len(missing)} of the {len(shards)} files that "
                f"{INDEX_FILE} names: the download is not complete; download it again"
            )
        for shard in shards:
            self._files[shard] = RankReader(self.path / shard)
        for name, shard in index.items():
            self._readers[name] = self._files[shard]
        for shard, reader in self._files.items():
            listed = {name for name, owner in index.items() if owner == shard}
            if differing := sorted(listed ^ set(reader.names())):
                where = "is not in it" if differing[0] in listed else "is not in the index"
                raise CheckpointError(
                    f"{INDEX_FILE} and {reader.path} disagree: {differing[0]} {where}; "
                    "download the checkpoint again"
                )

    def _open_single(self) -> None:
        path = self.path / SINGLE_FILE
        if not path.is_file():
            raise _no_weights(self.path)
        reader = self._files[SINGLE_FILE] = RankReader(path)
        self._readers = dict.fromkeys(reader.names(), reader)


def _no_weights(path: Path) -> CheckpointError:
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        return UnsupportedCheckpointError(
            f"{path} holds pickles ({pickles[0]}), which can run any code when loaded; save the "
            "model again with transformers' save_pretrained, which writes safetensors"
        )
    if partial := sorted(path.glob("model-*-of-*.safetensors")):
        return CheckpointNotFoundError(
            f"{path} has {partial[0].name} and no {INDEX_FILE}: the download is not complete; "
            "download it again"
        )
    return CheckpointNotFoundError(
        f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}: there are no weights to read "
        "(pickles are not taken)"
    )
